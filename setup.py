"""The optional compiled kernels; everything else about the package is in pyproject.toml.

Without a C++ compiler, or with one that fails, the install goes on without them and the torch forms serve, unless
XLSTM_RL_KERNELS=required is set. They are written in the vector extensions of GCC and clang: on Windows clang-cl, which
comes with Visual Studio and with LLVM, builds them where it is on the path.
From a checkout, `python setup.py build_ext --inplace` builds them where they are imported.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("xlstm_rl/kernels/cpp")
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math"]
# One build per instruction set; kernels/cpp_extension.py picks the one that the machine can run.
INSTRUCTION_SETS = {"base": []}
if platform.machine().lower() in ("x86_64", "amd64"):
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
        optional=os.environ.get("XLSTM_RL_KERNELS") != "required",
    )


class BuildWithVectorExtensions(build_ext):
    """Builds the extensions with GCC, clang, or clang-cl in place of MSVC."""

    def build_extensions(self):
        """Build those that the compiler can."""
        if self.compiler.compiler_type != "msvc":
            for ext in self.extensions:
                ext.extra_compile_args += ["-fvisibility=hidden", "-g0"]
        elif shutil.which("clang-cl"):
            # it takes the command line of MSVC, and that of clang behind a prefix
            self.compiler.initialize()
            self.compiler.cc = shutil.which("clang-cl")
            for ext in self.extensions:
                ext.extra_compile_args = [f"/clang:{flag}" for flag in ext.extra_compile_args]
        elif not all(ext.optional for ext in self.extensions):
            sys.exit("the compiled kernels are required, and MSVC cannot build them: put clang-cl (LLVM) on the path")
        else:
            self.extensions = []
        super().build_extensions()


setup(
    cmdclass={"build_ext": BuildWithVectorExtensions},
    ext_modules=[extension(name, flags) for name, flags in INSTRUCTION_SETS.items()],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
