"""Diptych's nodes for ComfyUI, found by `comfy_entrypoint`."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
