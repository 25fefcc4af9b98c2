"""Kept for code that runs exported programs through this module; new code takes `deploy.runtimes`."""
from deploy.runtimes import load_onnx_program, load_paddle_program, program_file, save_paddle_program

__all__ = ['load_onnx_program', 'load_paddle_program', 'program_file', 'save_paddle_program']
