"""Compatibility module for code that imports from `programs`; new code imports from `deploy.runtimes`."""
from deploy.runtimes import load_onnx_program, load_paddle_program, program_file, save_paddle_program

__all__ = ['load_onnx_program', 'load_paddle_program', 'program_file', 'save_paddle_program']
