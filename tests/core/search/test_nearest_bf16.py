"""The screen before the search answers as float64 differences do; without a matrix unit it is slow, and as right."""

import math

import pytest
import torch
from torch import Tensor

from raydc.core.search import nearest as nearest_module
from raydc.core.search import nearest_bf16
from raydc.core.search.nearest import nearest

needs_setting = pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has no precision setting for products alone"
)


def rows_and_centers(kind: str, *, n: int = 1500, k: int = 300, d: int = 80) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n + k, d, generator=generator)
    if kind == "decaying":
        x = torch.nn.functional.normalize(x * torch.arange(1, d + 1) ** -0.5, dim=1)
    if kind == "offset":
        x = x + 1000.0
    if kind == "tiny":
        x = x * 1e-15
    if kind == "lopsided":
        x[:, 0] *= 1e4
    return x[:n], x[n:]


def exact(z_ND: Tensor, centers_KD: Tensor) -> Tensor:
    return torch.stack([((row - centers_KD.double()) ** 2).sum(dim=1) for row in z_ND.double()])


@needs_setting
@pytest.mark.parametrize("kind", ["noise", "decaying", "offset", "tiny", "lopsided"])
def test_the_nearest_center_is_that_of_float64_differences(kind):
    z, centers = rows_and_centers(kind)
    squared_NK = exact(z, centers)

    ids, squared = nearest_bf16.screened_nearest(z, centers)

    least = squared_NK.min(dim=1)
    # Two centers at one distance but for rounding: either is right.
    of_found = squared_NK.gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(of_found, least.values, rtol=1e-6, atol=0)
    assert (ids == least.indices).double().mean() > 0.999
    torch.testing.assert_close(squared.double(), of_found, rtol=1e-5, atol=0)


@needs_setting
def test_the_bound_holds_for_every_pair():
    z, centers = rows_and_centers("decaying", n=512)
    screen = nearest_bf16.Screen(centers)

    row, center = (torch.from_numpy(ids) for ids in screen.pairs(z))

    # With the bound at zero only the apparent first would stay; the true first must be among the pairs of every row.
    kept = torch.zeros(len(z), len(centers), dtype=torch.bool)
    kept[row, center] = True
    assert bool(kept[torch.arange(len(z)), exact(z, centers).argmin(dim=1)].all())
    assert len(row) < 4 * len(z)


@needs_setting
def test_the_norms_of_the_centers_come_out_of_the_product_whole():
    """Three numbers of eight digits each are one of twenty-four; what the product adds to them is taken off again."""
    _, centers = rows_and_centers("lopsided")
    screen = nearest_bf16.Screen(centers)
    shifted = (centers - centers.mean(dim=0)).double()
    screen.pairs(centers.mean(dim=0).expand(2, -1).contiguous())
    half_BK = screen.half_BK[:2].double()
    torch.testing.assert_close(half_BK[0, :300], 0.5 * shifted.square().sum(dim=1), rtol=1e-6, atol=0)
    assert torch.isinf(half_BK[:, 300:]).all()


@needs_setting
def test_of_equal_centers_the_lower_id_is_taken_and_many_of_them_are_searched_by_faiss():
    z, centers = rows_and_centers("noise")
    twice = torch.cat([centers, centers])
    assert (nearest_bf16.screened_nearest(z, twice)[0] < len(centers)).all()

    same = centers[:1].expand(300, -1).contiguous()
    assert nearest_bf16.Screen(same).pairs(z[:512]) is None
    ids, squared = nearest_bf16.screened_nearest(z, same)
    assert ((ids >= 0) & (ids < 300)).all()
    torch.testing.assert_close(squared.double(), exact(z, same)[:, 0], rtol=1e-4, atol=0)


@needs_setting
def test_a_row_that_is_not_finite_gets_what_faiss_gives_and_harms_no_other():
    z, centers = rows_and_centers("noise")
    expected, _ = nearest_bf16.screened_nearest(z, centers)
    z[7, 0], z[11, 3] = math.nan, math.inf

    ids, _ = nearest_bf16.screened_nearest(z, centers)

    others = torch.tensor([n for n in range(len(z)) if n not in (7, 11)])
    assert torch.equal(ids[others], expected[others])


@needs_setting
def test_products_have_their_precision_back_afterward():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(ZeroDivisionError), nearest_bf16.products_in_bf16():
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        raise ZeroDivisionError
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@needs_setting
def test_nearest_takes_the_screen_where_it_pays(monkeypatch):
    z, centers = rows_and_centers("decaying")
    asked = []
    monkeypatch.setattr(
        nearest_module, "screened_nearest", lambda *a: asked.append(1) or nearest_bf16.screened_nearest(*a)
    )
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})

    ids, squared = nearest(z, centers)
    assert asked == [1] and ids.shape == squared.shape == (len(z), 1)
    nearest(z, centers, num=2)
    nearest(z[:, :32].contiguous(), centers[:, :32].contiguous())
    nearest(z[:100], centers)
    nearest(z, centers[:100])
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False})
    other, _ = nearest(z, centers)
    assert asked == [1]
    assert (ids == other).double().mean() > 0.999
