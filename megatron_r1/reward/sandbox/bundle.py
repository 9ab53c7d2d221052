"""The code that runs inside a box, as bytes for a pipe, and the lines of Python that take it from there.

So a box needs no file of this project, and starts faster than by compiling one.
"""

import functools
import marshal
from pathlib import Path

from megatron_r1.reward.sandbox import inside

BOOT = """
import marshal, os, sys
from _frozen_importlib import ModuleSpec

def take(size):
    data = b""
    while len(data) < size:
        piece = os.read(0, size - len(data))
        if not piece:
            os._exit(1)  # whoever started this died before a signal of that was asked for
        data += piece
    return data

class Bundle:
    code = marshal.loads(take(int.from_bytes(take(4), "big")))
    def find_spec(self, name, path=None, target=None):
        if name in self.code:
            return ModuleSpec(name, self, is_package=self.code[name] is None)
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        if self.code[module.__name__] is not None:
            exec(marshal.loads(self.code[module.__name__]), module.__dict__)

sys.meta_path.insert(0, Bundle())
from megatron_r1.reward.sandbox.inside.main import main
main()
"""


@functools.cache
def bundle() -> bytes:
    """Length, then the code of all modules of `inside` by name; None is a package."""
    package = inside.__name__.split(".")
    code: dict[str, bytes | None] = {".".join(package[:depth]): None for depth in range(1, len(package) + 1)}
    for file in sorted(Path(inside.__file__).parent.glob("*.py")):
        if file.stem != "__init__":
            # Programs can see the names of files: they are neutral.
            module = compile(file.read_text("utf-8"), f"<box>/{file.name}", "exec", optimize=0)
            code[f"{inside.__name__}.{file.stem}"] = marshal.dumps(module)
    data = marshal.dumps(code)
    return len(data).to_bytes(4, "big") + data
