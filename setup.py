"""The optional compiled kernels; everything else about the package is in pyproject.toml.

Without a C++ compiler, or with one that fails, the install goes on without them and the torch forms serve; with MSVC
too, which does not know the vector extensions of GCC and clang that they are written in.
From a checkout, `python setup.py build_ext --inplace` builds them where they are imported.
"""

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("xlstm_rl/kernels/cpp")
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0"]
# One build per instruction set; kernels/cpp_extension.py picks the one that the machine can run.
INSTRUCTION_SETS = {"base": []}
if platform.machine().lower() in ("x86_64", "amd64") and sys.platform != "win32":
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = [
        *("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"),
        "-mprefer-vector-width=512",
    ]


def extension(name: str, flags: list[str]) -> Extension:
    """The kernels compiled for one instruction set; they need no torch, and one build serves every Python version."""
    return Extension(
        f"xlstm_rl.kernels._cpp_{name}",
        [(SOURCES / "module.cpp").as_posix()],
        depends=sorted(header.as_posix() for header in SOURCES.glob("*.h")),
        define_macros=[("MODULE_NAME", f"_cpp_{name}")],
        extra_compile_args=FLAGS + flags,
        language="c++",
        py_limited_api=True,
        optional=True,
    )


class BuildWithoutMSVC(build_ext):
    """Builds the extensions with any compiler but MSVC."""

    def build_extensions(self):
        """Build those that the compiler can."""
        if self.compiler.compiler_type == "msvc":
            self.extensions = []
        super().build_extensions()


setup(
    cmdclass={"build_ext": BuildWithoutMSVC},
    ext_modules=[extension(name, flags) for name, flags in INSTRUCTION_SETS.items()],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
