"""Settings by the name of an objective and a preset: what fills in where the user's file says nothing.

`paper` follows what was published or is in the authors' code, for small data. Where the two differ from what raydc
computes, the number is converted and the line says how. `scale` is for many rows and leaves: large batches (fewer
all-reduces), fewer passes, a kernel calibrated to the number of leaves, moving averages instead of counts.
"""

from typing import Any

Preset = dict[str, dict[str, Any]]

# DEC's authors: 50,000 iterations a layer and 100,000 for the whole at batch 256, which on MNIST's 70,000 rows are 183
# and 366 epochs; rate 0.1, a tenth of it after every 20,000 iterations. Their loss is half of the mean over elements:
# 0.1 there is 0.05 here; where they raise the momentum over 1000 iterations, the rate rises here. Rows are scaled to
# |x|^2 / D = 1 as the paper says; their code for MNIST multiplies pixels in [0, 1] by 5.1, which is preprocess.factor.
_DEC_PRETRAINING: Preset = {
    "preprocess": {"method": "scale"},
    "autoencoder": {"hidden_dims": (500, 500, 2000), "latent_dim": 10},
    "pretrain": {
        "layerwise": True,
        "layer_epochs": 183,
        "layer_corruption": 0.2,
        "num_epochs": 366,
        "batch_rows": 256,
        "optimizer": "sgd",
        "learning_rate": 0.05,
        "warmup_steps": 1000,
        "schedule": "steps",
        "decay_steps": 20_000,
        "corruption": 0.0,
    },
    "cluster": {"num_restarts": 20},
}

_SCALE_PRETRAINING: Preset = {
    "pretrain": {
        "num_epochs": 10,
        "batch_rows": 4096,
        "learning_rate": 1e-3,
        "warmup_steps": 1000,
        "schedule": "cosine",
    },
    "cluster": {"num_restarts": 1},
}

_SCALE_HEAD: Preset = {
    "preprocess": {"method": "l2"},
    "cluster": {"num_restarts": 1},
    "refine": {"num_epochs": 10, "batch_rows": 4096},
}

PRESETS: dict[str, dict[str, Preset]] = {
    "dec": {
        # Alpha and scale are 1 in the paper; a new target every 160 iterations is some two in an epoch of MNIST.
        "paper": _DEC_PRETRAINING
        | {
            "refine": {
                "num_epochs": 73,
                "batch_rows": 256,
                "optimizer": "sgd",
                "learning_rate": 0.01,
                "refreshes_per_epoch": 2,
                "tolerance": 1e-3,
                "alpha": 1.0,
                "scale": 1.0,
                "max_grad_norm": None,
            }
        },
        "scale": _SCALE_PRETRAINING
        | {"refine": {"num_epochs": 5, "batch_rows": 4096, "refreshes_per_epoch": 1, "alpha": "auto", "scale": "auto"}},
    },
    "idec": {
        "paper": _DEC_PRETRAINING
        | {
            "refine": {
                "num_epochs": 73,
                "batch_rows": 256,
                "optimizer": "adam",
                "learning_rate": 1e-3,
                "refreshes_per_epoch": 2,
                "tolerance": 1e-3,
                "alpha": 1.0,
                "scale": 1.0,
                "clustering_weight": 0.1,
                "max_grad_norm": None,
            }
        },
        "scale": _SCALE_PRETRAINING
        | {"refine": {"num_epochs": 5, "batch_rows": 4096, "refreshes_per_epoch": 1, "alpha": "auto", "scale": "auto"}},
    },
    "dcn": {
        # Stacked, without corruption, 250 epochs a layer and for the whole. The authors' rate of 1e-4 is of sums over
        # 784 elements, some 0.08 of the mean. Counts from 100, k-means every ten epochs and at the end.
        "paper": {
            "preprocess": {"method": "scale"},
            "autoencoder": {"hidden_dims": (500, 500, 2000), "latent_dim": 10},
            "pretrain": {
                "layerwise": True,
                "layer_epochs": 250,
                "layer_corruption": 0.0,
                "num_epochs": 250,
                "batch_rows": 256,
                "optimizer": "sgd",
                "learning_rate": 0.08,
                "schedule": "constant",
                "corruption": 0.0,
            },
            "cluster": {"num_restarts": 10},
            "refine": {
                "num_epochs": 50,
                "batch_rows": 256,
                "optimizer": "sgd",
                "learning_rate": 0.08,
                "distance_weight": 1.0,
                "centroid_update": "counts",
                "recluster_epochs": 10,
                "max_grad_norm": None,
            },
        },
        # A leaf's average must span many of its rows: at 4096 rows a step and 10,000 leaves, 0.999 spans some 400.
        "scale": _SCALE_PRETRAINING
        | {
            "refine": {
                "num_epochs": 5,
                "batch_rows": 4096,
                "centroid_update": "ema",
                "centroid_decay": 0.999,
                "recluster_epochs": None,
            }
        },
    },
    "vade": {
        # On MNIST: pixels in [0, 1] and a Bernoulli decoder. The authors' code loads the weights of a pretrained
        # autoencoder; here it is pretrained by the run's own settings. Their eps of Adam, 1e-4, is not one of them.
        "paper": {
            "preprocess": {"method": "none"},
            "autoencoder": {"hidden_dims": (500, 500, 2000), "latent_dim": 10},
            "refine": {
                "num_epochs": 3000,
                "batch_rows": 100,
                "optimizer": "adam",
                "learning_rate": 2e-3,
                "max_grad_norm": None,
            },
            "vade": {
                "likelihood": "bernoulli",
                "component_weights": "learned",
                "kl_weight": 1.0,
                "warmup_epochs": 0.0,
                "decay": 0.9,
                "decay_epochs": 10,
                "decay_floor": 0.1,
            },
        },
        "scale": _SCALE_PRETRAINING
        | {
            "refine": {"num_epochs": 10, "batch_rows": 4096, "learning_rate": 1e-3, "max_grad_norm": None},
            "vade": {"warmup_epochs": 1.0, "decay": 0.8, "decay_epochs": 1},
        },
    },
    "distill": {
        # DeepCluster-v2's run of 400 epochs on ImageNet: a code of 128 numbers compared by cosine at temperature 0.1,
        # batches of 64 on each of 64 GPUs, k-means at every epoch, the cross-entropy alone. Its rates are LARS's for a
        # ResNet of random weights; the network here starts pretrained, and its rate stays the run's own.
        "paper": {
            "autoencoder": {"latent_dim": 128},
            "refine": {
                "num_epochs": 400,
                "batch_rows": 4096,
                "tolerance": 0.0,
                "max_grad_norm": None,
            },
            "distill": {
                "metric": "cosine",
                "temperature": 0.1,
                "reconstruction_weight": 0.0,
                "num_reclusterings": 400,
                "class_weights": "none",
            },
        },
        "scale": _SCALE_PRETRAINING | {"refine": {"num_epochs": 5, "batch_rows": 4096}},
    },
    "ae": {
        # Song et al., "Auto-encoder based data clustering" (2013), as ClustPy's AEC sets it: 100 and 150 epochs, Adam
        # at 1e-3 and 1e-4. Its weight of 0.1 is of |z - c|^2 beside the mean over elements: on MNIST's 784, 78.4 here.
        "paper": {
            "autoencoder": {"hidden_dims": (500, 500, 2000), "latent_dim": 10},
            "pretrain": {
                "num_epochs": 100,
                "batch_rows": 256,
                "optimizer": "adam",
                "learning_rate": 1e-3,
                "schedule": "constant",
            },
            "refine": {
                "num_epochs": 150,
                "batch_rows": 256,
                "optimizer": "adam",
                "learning_rate": 1e-4,
                "code_loss": "nearest",
                "code_weight": 78.4,
                "max_grad_norm": None,
            },
        },
        "scale": _SCALE_PRETRAINING | {"refine": {"num_epochs": 5, "batch_rows": 4096}},
    },
    "temi": {
        # The authors' run on CIFAR: 50 neighbors, 16 heads, batch 1024, 100 epochs, a rate of 1e-4 per 256 rows of a
        # batch. Theirs is AdamW with a rate that rises for 20 epochs; ours stays at its peak.
        "paper": {
            "neighbors": {"num": 50, "metric": "cosine"},
            "refine": {"num_epochs": 100, "batch_rows": 1024, "optimizer": "adam", "tolerance": 0.0},
            "head": {
                "hidden_dims": (512, 256),
                "start": "random",
                "temperature": 0.1,
                "learning_rate": 4e-4,
                "num_heads": 16,
                "pair_exponent": 0.6,
                "teacher_momentum": 0.996,
                "marginal_momentum": 0.9,
            },
        },
        "scale": _SCALE_HEAD,
    },
    "icon": {
        # A linear head from a random start, 3 neighbors, batch 4096, 30 epochs at 1e-3, which the authors halve every
        # 10 epochs; ours stays. Their head has no temperature and takes rows as they are.
        "paper": {
            "neighbors": {"num": 3, "metric": "cosine"},
            "refine": {"num_epochs": 30, "batch_rows": 4096, "optimizer": "adam", "tolerance": 0.0},
            "head": {"hidden_dims": (), "start": "random", "learning_rate": 1e-3, "debiasing": 0.6},
        },
        "scale": _SCALE_HEAD,
    },
    "autoencoder": {"paper": _DEC_PRETRAINING, "scale": _SCALE_PRETRAINING},
}
PRESETS["vdc"] = PRESETS["vade"]


def filled(values: dict[str, Any], objective: str, name: str) -> dict[str, Any]:
    """Return the settings with those of a preset wherever `values` has none.

    Raises:
        ValueError: the objective has no such preset.
    """
    preset = PRESETS.get(objective, {}).get(name)
    if preset is None:
        known = ", ".join(PRESETS.get(objective, {})) or "none"
        raise ValueError(f"fit.preset={name}: fit.objective={objective} has no such preset, only: {known}.")
    sections = {section: {**defaults, **_mapping(values.get(section))} for section, defaults in preset.items()}
    return {**values, **{s: v for s, v in sections.items() if isinstance(values.get(s, {}), dict)}}


def _mapping(section: Any) -> dict[str, Any]:
    return section if isinstance(section, dict) else {}
