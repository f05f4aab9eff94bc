"""An exported ONNX file beside the policy it was made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm

from xlstm_rl.export.onnx_file import require
from xlstm_rl.export.step_check import Check, compare_steps


def check_onnx(
    model: BaseAlgorithm, path: Path | str, *, action_masks: bool | None = None, n_steps: int = 200, seed: int = 0
) -> Check:
    """Run an exported policy in onnxruntime beside torch with random observations, resets and masks.

    Args:
        model: the agent that was exported.
        path: of the ONNX file.
        action_masks: as for `export_onnx`.
        n_steps: steps to compare.
        seed: of observations, resets and masks.

    Raises:
        ExportError: onnxruntime is missing, or an output is off by more than `TOLERANCE`; the message names it and the
            step.
    """
    require("onnxruntime")
    return compare_steps(model, _OnnxRunner(path), action_masks=action_masks, n_steps=n_steps, seed=seed)


class _OnnxRunner:
    """An ONNX file in onnxruntime, a `StepRunner`."""

    def __init__(self, path: Path | str) -> None:
        # Loaded here because it is optional.
        import onnxruntime

        self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.inputs: set[str] = {node.name for node in self._session.get_inputs()}

    def run(self, fed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `StepRunner.run`."""
        return dict(zip(self._outputs, self._session.run(self._outputs, fed), strict=True))
