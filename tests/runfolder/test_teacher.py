"""The teacher of a distillation: taken up whole, and refused before anything starts."""

from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from raydc.core.models.autoencoder import Autoencoder
from raydc.core.models.preprocess import Preprocess
from raydc.errors import ConfigError, DataError
from raydc.model import Model
from raydc.runfolder.teacher import load_teacher
from raydc.storage.lake import Lake
from tests.shards import corner_model, settings


@pytest.fixture
def run_folder(tmp_path):
    """A finished run as far as a teacher goes: 4 leaves over a code of 2, two groups, and a decoder."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(5, (7,), 2)
    model = corner_model(encoder=autoencoder.encoder, widths=(5, 7, 2), preprocess=Preprocess())
    model.save(Lake(), str(tmp_path / "run" / "model"))
    body = safetensors.torch.save(dict(autoencoder.decoder.state_dict()))
    Lake().write_bytes(str(tmp_path / "run" / "fit" / "decoder.safetensors"), body)
    return str(tmp_path / "run")


def config(uri, num_leaves=4, level=None, **sections):
    fit = {"objective": "distill", "teacher": uri, "teacher_level": level}
    sections = {"autoencoder": {"hidden_dims": [7], "latent_dim": 2}} | sections
    return settings("rows", fit=fit, cluster={"num_leaves": num_leaves}, refine={"target_top_q": 0.6}, **sections)


@pytest.mark.parametrize("inside", ["", "/model"])
def test_a_teacher_answers_as_its_own_model_does(run_folder, inside):
    x = torch.randn(200, 5)
    labels = Model.load(run_folder).predict(x)
    found = load_teacher(config(run_folder + inside), 5, Lake())
    np.testing.assert_array_equal(found.teacher.classes(x), labels.leaf)
    level = load_teacher(config(run_folder, 2, level=2), 5, Lake()).teacher
    np.testing.assert_array_equal(level.classes(x), labels.levels[2])
    assert level.num_classes == 2
    student = Autoencoder(5, (7,), 2)
    level.copy_network(student)
    torch.testing.assert_close(student.encoder(x), Model.load(run_folder).encode(x))


def test_no_teacher_is_no_teacher():
    assert load_teacher(config(None), 5, Lake()) is None


def test_another_model_at_the_same_place_has_another_fingerprint(run_folder):
    before = load_teacher(config(run_folder), 5, Lake()).fingerprint
    model = Model.load(run_folder)
    replace(model, details={"fingerprint": "another"}).save(Lake(), run_folder + "/model")
    assert load_teacher(config(run_folder), 5, Lake()).fingerprint != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 6}, "takes rows of width 5, the input has 6"),
        ({"num_leaves": 3}, "has 4 leaves, cluster.num_leaves is 3. Set cluster.num_leaves=4"),
        ({"level": 3}, "fit.teacher_level=3 is no level of the teacher's tree. Its levels: 2"),
        ({"level": 2}, "has 2 groups at level 2, cluster.num_leaves is 4"),
        ({"autoencoder": {"hidden_dims": [8], "latent_dim": 2}}, r"widths \[5, 7, 2\].*autoencoder.hidden_dims=\[7\]"),
        ({"preprocess": {"method": "l2"}}, "fitted with preprocess.method=none, the settings say l2"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(run_folder, changes, message):
    dim = changes.pop("dim", 5)
    with pytest.raises(ConfigError, match=message):
        load_teacher(config(run_folder, **changes), dim, Lake())


def test_a_teacher_without_a_decoder_teaches_without_reconstruction_only(run_folder):
    Lake().remove(run_folder + "/fit/decoder.safetensors")
    with pytest.raises(ConfigError, match="distill.reconstruction_weight=1.0 needs a decoder"):
        load_teacher(config(run_folder), 5, Lake())
    alone = load_teacher(config(run_folder, distill={"reconstruction_weight": 0}), 5, Lake())
    assert alone.teacher.decoder is None


def test_a_place_without_a_model_is_refused(tmp_path):
    with pytest.raises(DataError, match="no model there"):
        load_teacher(config(str(tmp_path)), 5, Lake())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"fit": {"objective": "dec", "teacher": "somewhere"}}, "fit.teacher has no effect on fit.objective=dec"),
        ({"fit": {"objective": "distill", "teacher_level": 3}}, "fit.teacher_level needs fit.teacher"),
        (
            {
                "fit": {"objective": "vade"},
                "vade": {"likelihood": "bernoulli"},
                "preprocess": {"method": "standardize"},
            },
            "bernoulli takes rows in .0, 1., which preprocess.method=standardize leaves",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(sections, message):
    with pytest.raises(ConfigError, match=message):
        settings("rows", refine={"target_top_q": 0.6}, **sections)
