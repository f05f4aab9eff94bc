"""Trained policies as files of ONNX or C: one step of the agent, memory state in and out, for runners without torch."""

from xlstm_rl.export.c_check import check_c, compiler, time_c
from xlstm_rl.export.c_file import export_c
from xlstm_rl.export.onnx_check import check_onnx
from xlstm_rl.export.onnx_file import ExportError, export_onnx
from xlstm_rl.export.step_check import Check

__all__ = ["Check", "ExportError", "check_c", "check_onnx", "compiler", "export_c", "export_onnx", "time_c"]
