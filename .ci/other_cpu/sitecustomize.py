"""With this folder in PYTHONPATH, torch answers wrongly whether the CPU has bfloat16.

Python imports the file by its name, in child processes, too. It does not import torch,
because the tests set variables before that.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType


class OtherCPU:
    """Finds torch.cpu, once, and changes what its import leaves."""

    def find_spec(
        self, name: str, path: object, target: object = None
    ) -> ModuleSpec | None:
        if name != "torch.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            answer = (
                module._is_avx512_bf16_supported() or module._is_amx_tile_supported()
            )
            module._is_avx512_bf16_supported = module._is_amx_tile_supported = lambda: (
                not answer
            )

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, OtherCPU())
