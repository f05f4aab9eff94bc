"""Trained policies as ONNX files: one step of the agent, memory state in and out, for runners without torch."""

from xlstm_rl.export.onnx_check import Check, check_onnx
from xlstm_rl.export.onnx_file import ExportError, export_onnx

__all__ = ["Check", "ExportError", "check_onnx", "export_onnx"]
