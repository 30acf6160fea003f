"""Variational deep embedding (VaDE): a variational autoencoder whose prior is a mixture of Gaussians.

Letters: N rows, K components, D width of a row, L latent width.
"""

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydc.core.hashing import hash_keys, normal
from raydc.core.models.autoencoder import Autoencoder
from raydc.core.models.mixture import Mixture, fit_mixture, log_joint
from raydc.core.objectives.kernel import Kernel
from raydc.core.objectives.objective import Minibatch, Objective, ObjectiveInputs, Pass
from raydc.core.search.nearest import nearest
from raydc.core.training.settings import FitSettings, VadeSettings

LOG_VARIANCE_BOUNDS = (-8.0, 8.0)
"""Bounds for components and posterior, in a latent scaled to variances of about 1 inside a component."""

_START_LOG_VARIANCE = math.log(0.01)
"""The posterior's at the start: a tenth of a component's deviation, so the pretrained decoder still knows its input."""


def prior_divergence(log_gamma_NK: Tensor, mean_NL: Tensor, log_variance_NL: Tensor, mixture: Mixture) -> Tensor:
    """Return KL(q(z, c | x) || p(z, c)) of each row as (N,), the expectation over z in closed form.

    sum_c gamma_c (1/2 sum_d (log s2_cd + v_d / s2_cd + (m_d - mu_cd)^2 / s2_cd) - log pi_c + log gamma_c)
    - 1/2 sum_d (1 + log v_d), for q(z | x) = N(m, diag v), q(c | x) = gamma and p(z, c) = pi_c N(mu_c, diag s2_c).

    Args:
        log_gamma_NK: (N, K) log q(c | x); exp of each row sums to 1.
        mean_NL: (N, L) m.
        log_variance_NL: (N, L) log v.
        mixture: the prior.

    Source: Jiang, Zheng, Tan, Tang, Zhou, "Variational Deep Embedding", arXiv:1611.05148. The terms
    in log 2 pi cancel, since gamma sums to 1.
    """
    # -E_q log p(z, c) is minus the joint density at the mean, plus what the variance adds.
    added = 0.5 * torch.exp(log_variance_NL) @ torch.exp(-mixture.log_variances_KL).T
    expected_NK = added - log_joint(mean_NL, mixture) + log_gamma_NK
    entropy = 0.5 * (math.log(2.0 * math.pi) + 1.0 + log_variance_NL).sum(dim=1)
    return (log_gamma_NK.exp() * expected_NK).sum(dim=1) - entropy


def bernoulli_loss(x_ND: Tensor, logits_ND: Tensor) -> Tensor:
    """Return -log p(x | z) of each row as (N,) for x in [0, 1]: the cross-entropy summed over the elements."""
    return F.binary_cross_entropy_with_logits(logits_ND, x_ND, reduction="none").sum(dim=1)


def gaussian_loss(x_ND: Tensor, y_ND: Tensor, log_variance: Tensor) -> Tensor:
    """Return -log N(x; y, exp(log_variance) I) of each row as (N,)."""
    squared = ((x_ND - y_ND) ** 2).sum(dim=1)
    return 0.5 * (x_ND.shape[1] * (math.log(2.0 * math.pi) + log_variance) + squared * torch.exp(-log_variance))


def latent_noise(keys_N: Tensor, latent_dim: int, seed: int) -> Tensor:
    """Return (N, L) float32 standard normal noise: a hash of (row key, dimension, seed), the same on any worker."""
    columns = hash_keys(torch.arange(latent_dim, device=keys_N.device), seed)
    return normal(keys_N[:, None] ^ columns, seed)


@torch.no_grad()
def rescale(encoder: nn.Sequential, decoder: nn.Sequential, shift_L: Tensor, deviation_L: Tensor) -> None:
    """Give the code of an autoencoder another origin and unit, in place: z becomes (z - shift) / deviation.

    The last layer of the encoder and the first of the decoder take it up, so reconstructions stay as they were.
    """
    code, back = encoder[-1], decoder[0]
    assert isinstance(code, nn.Linear) and isinstance(back, nn.Linear)
    code.weight.div_(deviation_L[:, None])
    code.bias.sub_(shift_L).div_(deviation_L)
    back.bias.add_(back.weight @ shift_L)
    back.weight.mul_(deviation_L)


@torch.no_grad()
def to_logits(decoder: nn.Sequential) -> None:
    """Turn an output that was trained toward values in [0, 1] into logits, in place: y becomes 8 (y - 1/2).

    A pixel that was reconstructed as 0 or 1 gets a probability of .018 or .982.
    """
    last = decoder[-1]
    assert isinstance(last, nn.Linear)
    last.bias.sub_(0.5).mul_(8.0)
    last.weight.mul_(8.0)


class UnitRange:
    """The pass that refuses rows with elements outside [0, 1]: a Bernoulli decoder has no likelihood for them."""

    def __init__(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64)

    def add(self, batch: Minibatch) -> None:
        """Count rows."""
        outside = ((batch.x_ND < 0) | (batch.x_ND > 1)).any(dim=1).sum()
        self._sums += torch.tensor([int(outside), len(batch)], dtype=torch.float64)

    def sums(self) -> Tensor:
        """Return the numbers of rows outside, and of all."""
        return self._sums

    def end(self, sums: Tensor) -> dict[str, Any]:
        """Raise if a row is outside.

        Raises:
            ValueError: with their number.
        """
        outside, count = (int(n) for n in sums.tolist())
        if outside:
            raise ValueError(
                f"vade.likelihood=bernoulli takes preprocessed rows in [0, 1]; {outside} of {count} rows leave it. Set "
                "vade.likelihood=gaussian, or preprocess the rows into [0, 1]."
            )
        return {}


class Vade(Objective):
    """-ELBO = -E_q log p(x | z) + kl_weight KL(q(z, c | x) || p(z, c)), with one reparameterized sample of z.

    q(c | x) is the posterior p(c | z) at the sample, as in the paper, and carries gradients. Weights, variances and
    responsibilities live in log space; the paper's code has raw parameters, which Adam can push below zero, and a
    density that underflows to a uniform posterior without gradient far from every mode. kl_weight is 1 in the paper.

    Source: Jiang, Zheng, Tan, Tang, Zhou, "Variational Deep Embedding", arXiv:1611.05148.
    """

    encoder: nn.Sequential
    decoder: nn.Sequential

    def __init__(self, autoencoder: Autoencoder, num_components: int, kernel: Kernel, settings: VadeSettings) -> None:
        """Take the layers of an autoencoder: its code layer is the mean of q(z | x); the variance is a new layer."""
        super().__init__()
        self.encoder, self.decoder = autoencoder.encoder, autoencoder.decoder
        code = autoencoder.encoder[-1]
        assert isinstance(code, nn.Linear)
        self.log_variance = nn.Linear(code.in_features, code.out_features)
        nn.init.zeros_(self.log_variance.weight)
        nn.init.constant_(self.log_variance.bias, _START_LOG_VARIANCE)
        learned = settings.component_weights == "learned"
        self.weight_logits = nn.Parameter(torch.zeros(num_components), requires_grad=learned)
        self.means = nn.Parameter(torch.zeros(num_components, code.out_features))
        self.log_variances = nn.Parameter(torch.zeros(num_components, code.out_features))
        if settings.likelihood == "gaussian":
            self.log_noise = nn.Parameter(torch.zeros(()))
        self.kernel, self.settings = kernel, settings
        self.sample_rows = settings.start_rows
        self.kl_weight = settings.kl_weight

    @classmethod
    def check_inputs(cls, settings: FitSettings) -> Pass | None:
        """Return the pass that refuses rows for which a Bernoulli decoder has no likelihood."""
        return UnitRange() if settings.vade.likelihood == "bernoulli" else None

    @classmethod
    def from_inputs(cls, inputs: ObjectiveInputs) -> Self:
        """Return the objective that starts from these inputs."""
        assert inputs.autoencoder is not None
        model = cls(inputs.autoencoder, len(inputs.centers_KL), inputs.kernel, inputs.settings.vade)
        with torch.no_grad():
            model.means.copy_(inputs.centers_KL)
        return model

    @property
    def centers(self) -> Tensor:  # type: ignore[override]
        """The means of the components."""
        return self.means

    @property
    def mixture(self) -> Mixture:
        """The prior, with gradients."""
        return Mixture(
            torch.log_softmax(self.weight_logits, dim=0), self.means, self.log_variances.clamp(*LOG_VARIANCE_BOUNDS)
        )

    @torch.no_grad()
    def initialize(self, sample_NL: Tensor, weights_N: Tensor | None = None) -> None:
        """Scale the code to a variance of 1 inside the k-means clusters, and fit the mixture to the sample from them.

        A plain autoencoder's code has any origin and unit, while the bounds of the variances, the steps of Adam and
        the start of log v mean something for variances near 1 only. Row weights play no part: scikit-learn's mixture,
        which is fitted here, takes none.
        """
        ids = nearest(sample_NL, self.means.to(sample_NL.device))[0][:, 0]
        inside = (sample_NL - self.means[ids]).double()
        deviation = inside.pow(2).mean(dim=0).sqrt().clamp_min(1e-12).to(sample_NL)
        shift = sample_NL.double().mean(dim=0).to(sample_NL)
        rescale(self.encoder, self.decoder, shift, deviation)
        z = ((sample_NL - shift) / deviation).cpu()
        mixture, _ = fit_mixture(
            z, ids.cpu(), num_components=len(self.means), num_iterations=self.settings.start_iterations, floor=1e-3
        )
        if self.weight_logits.requires_grad:
            self.weight_logits.copy_(mixture.log_weights_K)
        self.means.copy_(mixture.means_KL)
        self.log_variances.copy_(mixture.log_variances_KL)
        if self.settings.likelihood == "bernoulli":
            to_logits(self.decoder)

    def reconstruct(self, x_ND: Tensor) -> Tensor:
        """Return the decoder's answer to the mean of z."""
        y: Tensor = self.decoder(self.encoder(x_ND).float())
        return y.float()

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return the network, and the mixture with its own rate."""
        prior = [p for p in (self.weight_logits, self.means, self.log_variances) if p.requires_grad]
        known = {id(self.weight_logits), *(id(p) for p in prior)}
        network = [p for p in self.parameters() if id(p) not in known]
        own = self.settings.mixture_learning_rate
        return [
            {"params": network, "lr": learning_rate},
            {"params": prior, "lr": learning_rate if own is None else own},
        ]

    def rate_factor(self, epoch: int) -> float:
        """Return the decay of the rates."""
        return max(self.settings.decay ** (epoch // self.settings.decay_epochs), self.settings.decay_floor)

    def refresh(self, epoch: int, step: int, num_steps: int) -> Pass | None:
        """Set the weight of the divergence for the step; the first step of a Gaussian decoder comes after a pass."""
        warmup = self.settings.warmup_epochs
        done = 1.0 if warmup == 0 else min(1.0, (epoch + (step + 1) / num_steps) / warmup)
        self.kl_weight = self.settings.kl_weight * done
        return _NoiseStart(self) if self.settings.likelihood == "gaussian" and (epoch, step) == (0, 0) else None

    def after_step(self, sums: Tensor | None) -> None:
        """Take variances back to their bounds: beyond them they would have no gradient and never return."""
        self.log_variances.clamp_(*LOG_VARIANCE_BOUNDS)

    def forward(self, batch: Minibatch) -> dict[str, Tensor]:
        """Return weighted sums over the rows: `loss`, and its parts `reconstruction` and `kl`."""
        noise = latent_noise(batch.keys_N, self.means.shape[1], batch.seed)
        return self.evidence(batch.x_ND, batch.weights_N, noise, self.kl_weight)

    def evidence(self, x_ND: Tensor, weights_N: Tensor, noise_NL: Tensor, kl_weight: float) -> dict[str, Tensor]:
        """Return the sums of `forward` for a given noise, standard normal and (N, L)."""
        hidden = self.encoder[:-1](x_ND)
        full = self.means.dtype
        mean, log_variance = self.encoder[-1](hidden).to(full), self.log_variance(hidden).to(full)
        log_variance = log_variance.clamp(*LOG_VARIANCE_BOUNDS)
        z = mean + torch.exp(0.5 * log_variance) * noise_NL
        y = self.decoder(z).to(full)
        # Densities, softmax and sums stay in float32: in bf16 a responsibility has three digits.
        with torch.autocast(x_ND.device.type, enabled=False):
            mixture = self.mixture
            log_gamma = torch.log_softmax(log_joint(z, mixture), dim=1)
            kl = (weights_N * prior_divergence(log_gamma, mean, log_variance, mixture)).sum()
            if self.settings.likelihood == "bernoulli":
                missing = bernoulli_loss(x_ND, y)
            else:
                missing = gaussian_loss(x_ND, y, self.log_noise)
            reconstruction = (weights_N * missing).sum()
        loss = reconstruction + kl_weight * kl
        return {"loss": loss, "reconstruction": reconstruction.detach(), "kl": kl.detach()}

    def predictor(self) -> Mixture:
        """Return the mixture: a row's leaf is the most probable component at the mean of its z."""
        return self.mixture.detached()


class _NoiseStart:
    """The pass that starts the variance of a Gaussian decoder at the squared error of the pretrained autoencoder."""

    def __init__(self, model: Vade) -> None:
        self._model = model
        self._sums = torch.zeros(2, dtype=torch.float64, device=model.means.device)

    def add(self, batch: Minibatch) -> None:
        """Count the squared errors of rows."""
        squared = ((self._model.reconstruct(batch.x_ND) - batch.x_ND).double() ** 2).mean(dim=1)
        weights = batch.weights_N.double()
        self._sums += torch.stack([weights @ squared, weights.sum()])

    def sums(self) -> Tensor:
        """Return the weighted sum of the squared errors, and of the weights."""
        return self._sums

    def end(self, sums: Tensor) -> dict[str, Any]:
        """Set the variance; return it as `noise`."""
        mean = (sums[0] / sums[1]).clamp_min(1e-12)
        self._model.log_noise.copy_(mean.log())
        return {"noise": float(mean)}
