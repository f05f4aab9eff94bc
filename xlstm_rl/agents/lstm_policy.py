"""The LSTM policies of sb3-contrib by their arguments, on our memory cores."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.torch_layers import NatureCNN

from xlstm_rl.agents.actor_critic import CriticMemory
from xlstm_rl.agents.features import FlatSmallImagesExtractor
from xlstm_rl.agents.policy import XLSTMPolicy


class LSTMPolicy(XLSTMPolicy):
    """A policy with an LSTM memory that takes the arguments of sb3-contrib's "MlpLstmPolicy".

    Args:
        *args: as for `XLSTMPolicy`.
        lstm_hidden_size: units per layer.
        n_lstm_layers: stacked layers.
        shared_lstm: one LSTM for actor and critic; unlike sb3-contrib's, it is trained by both losses.
        enable_critic_lstm: an LSTM of its own for the critic.
        lstm_kwargs: `bias` and `dropout` of `torch.nn.LSTM`.
        **kwargs: as for `XLSTMPolicy`.

    Raises:
        ValueError: both `shared_lstm` and `enable_critic_lstm` are set.
    """

    def __init__(
        self,
        *args: Any,
        lstm_hidden_size: int = 256,
        n_lstm_layers: int = 1,
        shared_lstm: bool = False,
        enable_critic_lstm: bool = True,
        lstm_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if shared_lstm and enable_critic_lstm:
            raise ValueError("shared_lstm=True needs enable_critic_lstm=False: the critic has one LSTM or the other")
        critic: CriticMemory = "shared" if shared_lstm else "separate" if enable_critic_lstm else "none"
        kwargs.setdefault("memory", "lstm")
        settings = {"hidden_size": lstm_hidden_size, "num_layers": n_lstm_layers, **(lstm_kwargs or {})}
        kwargs.setdefault("memory_kwargs", settings)
        kwargs.setdefault("critic_memory", critic)
        super().__init__(*args, **kwargs)


class CnnLSTMPolicy(LSTMPolicy):
    """`LSTMPolicy` for image observations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", NatureCNN)
        super().__init__(*args, **kwargs)


class MultiInputLSTMPolicy(LSTMPolicy):
    """`LSTMPolicy` for Dict observations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", FlatSmallImagesExtractor)
        super().__init__(*args, **kwargs)
