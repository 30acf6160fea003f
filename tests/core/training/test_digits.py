"""VaDE and distillation on digits, by a small network: about as good as the k-means that they start from, or better."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from raydc.core.metrics import scores
from raydc.core.models.preprocess import Preprocess
from raydc.core.training.collectives import Ranks
from raydc.core.training.fit import fit
from raydc.core.training.settings import AutoencoderSettings
from tests.core.ranks import SETTINGS, PlainContext, make_rows, with_objective


def accuracy(clustering, x, classes):
    with torch.no_grad():
        leaves = clustering.assign(clustering.encoder(torch.from_numpy(x)))[0].numpy()
    table = np.zeros((10, 10), np.int64)
    np.add.at(table, (leaves, classes), 1)
    return scores.external(table)["acc"]


@pytest.mark.parametrize("objective", ["vade", "distill"])
def test_digits_are_clustered_about_as_well_as_by_the_autoencoder_at_least(objective):
    x, classes = load_digits(return_X_y=True)
    # Pixels of 0..16.
    x = (x / 16.0).astype(np.float32)
    settings = with_objective(
        objective,
        autoencoder=AutoencoderSettings(hidden_dims=(128, 256), latent_dim=10),
        pretrain=replace(SETTINGS.pretrain, num_epochs=30, corruption=0.0, learning_rate=2e-3),
        cluster=replace(SETTINGS.cluster, num_leaves=10, num_restarts=10),
        refine=replace(SETTINGS.refine, num_epochs=15, max_grad_norm=None),
        vade=replace(SETTINGS.vade, likelihood="bernoulli", component_weights="uniform", kl_weight=3.0, decay=1.0),
    )
    fitted = fit(make_rows(Ranks(), x), Preprocess(), settings, PlainContext())
    before = accuracy(fitted.baselines["autoencoder_kmeans"], x, classes)
    after = accuracy(fitted.clustering, x, classes)
    assert after > before - 0.06 and after > 0.62, (before, after)
    assert float(fitted.leaves.weights_K.min()) > 40
