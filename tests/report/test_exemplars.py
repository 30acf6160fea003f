"""The nearest rows of each leaf."""

import io

import numpy as np
import pyarrow as pa
from PIL import Image

from raydc.report.exemplars import contact_sheet, make_cards


def leaves(num_leaves):
    """Return a leaf table in which later leaves are larger."""
    return pa.table(
        {
            "leaf": np.arange(num_leaves, dtype=np.int32),
            "rows": np.arange(1, num_leaves + 1),
            "mean_distance": np.ones(num_leaves),
            "silhouette": np.ones(num_leaves),
            "majority_label": pa.array(["a"] * num_leaves),
            "majority_share": np.ones(num_leaves),
        }
    )


def test_rows_are_listed_nearest_first_ten_at_most_with_what_they_carry():
    order = np.random.default_rng(0).permutation(14)
    exemplars = pa.table(
        {
            "leaf": np.ones(14, np.int32),
            "key": order,
            "id": [f"row {i}" for i in order],
            "distance": order.astype(np.float32),
            "label": pa.array(["b" if i == 1 else "a" for i in order]),
            "caption": pa.array([None if i == 2 else f"about {i}" for i in order]),
        }
    )
    cards = make_cards(leaves(2), exemplars, colors=["#000000"] * 2)
    assert cards.carried == ["caption"]
    assert cards.cards[0].exemplars == []
    found = cards.cards[1].exemplars
    assert [e.id for e in found] == [f"row {i}" for i in range(10)]
    assert [e.agrees for e in found][:3] == [True, False, True]
    assert found[2].carried == [""]
    assert found[3].described(cards.carried) == "id row 3, label a, distance 3.000, caption about 3"


def test_of_many_leaves_the_largest_are_shown_in_tree_order():
    cards = make_cards(leaves(250), None, colors=["#000000"] * 250)
    assert [c.leaf for c in cards.cards] == list(range(50, 250))
    assert cards.left_out == 50


def embeddings(pixels):
    """Return exemplars of one leaf with these rows as their pictures."""
    flat = np.asarray(pixels, dtype=np.float32).reshape(len(pixels), -1)
    column = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
    count = len(pixels)
    return pa.table(
        {"leaf": np.zeros(count, np.int32), "rank": np.arange(count), "id": np.arange(count), "embedding": column}
    )


def test_rows_that_are_images_become_one_picture_per_leaf():
    pixels = np.linspace(0, 1, 3 * 8 * 6).reshape(3, 8, 6)
    (card,) = make_cards(leaves(1), embeddings(pixels), colors=["#000000"], image_shape=[8, 6]).cards
    assert card.picture.startswith("data:image/png;base64,")
    color = make_cards(leaves(1), embeddings(np.ones((2, 5, 5, 3))), colors=["#0"], image_shape=[5, 5, 3])
    assert color.cards[0].picture is not None


def test_rows_of_another_width_than_the_image_shape_are_not_drawn():
    (card,) = make_cards(leaves(1), embeddings(np.ones((2, 9))), colors=["#000000"], image_shape=[4, 4]).cards
    assert card.picture is None
    assert len(card.exemplars) == 2


def test_a_contact_sheet_is_ten_wide_enlarged_or_shrunk_to_a_common_size():
    small = Image.open(io.BytesIO(contact_sheet(np.full((3, 8, 8, 1), 200, np.uint8))))
    assert small.size == (10 * (24 + 2), 24)
    assert small.getpixel((13, 12)) == (200, 255)
    assert small.getpixel((250, 12))[1] == 0
    large = Image.open(io.BytesIO(contact_sheet(np.zeros((1, 100, 200, 3), np.uint8))))
    assert large.size == (10 * (48 + 2), 24)
