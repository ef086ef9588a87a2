"""The configuration of one trial.

A study's space addresses it by dotted path (``head.width``, ``data.normalization``). Unknown keys
are refused, units stand in names, and what does not fit together is refused at construction, before
a trial exists. Kinds that have different fields (projection heads, objectives, schemes) are separate
classes chosen by ``kind``.

The text under a field is its documentation: it goes into the JSON schema that
``headsearch study schema`` prints.
"""

from headsearch.config.heads import (
    Activation,
    AutoencoderHead,
    Head,
    HeadConfig,
    LinearHead,
    MlpHead,
    NoHead,
    ReweightHead,
    SparseHead,
)
from headsearch.config.images import DataConfig, DatasetName, Normalization, TrainOn, ViewsConfig
from headsearch.config.part import Config, Dim, Fraction, flatten, set_path
from headsearch.config.probes import AutoencoderConfig, ProbeConfig, Protocol
from headsearch.config.training import (
    AlternatingScheme,
    BarlowTwinsObjective,
    EncoderConfig,
    EncoderName,
    JointScheme,
    LarsForm,
    NtXentObjective,
    ObjectiveConfig,
    OptimizerConfig,
    SchemeConfig,
    TrainingConfig,
)
from headsearch.config.trial import TrialConfig

__all__ = [
    "Activation",
    "AlternatingScheme",
    "AutoencoderConfig",
    "AutoencoderHead",
    "BarlowTwinsObjective",
    "Config",
    "DataConfig",
    "DatasetName",
    "Dim",
    "EncoderConfig",
    "EncoderName",
    "Fraction",
    "Head",
    "HeadConfig",
    "JointScheme",
    "LarsForm",
    "LinearHead",
    "MlpHead",
    "NoHead",
    "Normalization",
    "NtXentObjective",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ProbeConfig",
    "Protocol",
    "ReweightHead",
    "SchemeConfig",
    "SparseHead",
    "TrainOn",
    "TrainingConfig",
    "TrialConfig",
    "ViewsConfig",
    "flatten",
    "set_path",
]
