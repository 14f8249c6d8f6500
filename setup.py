"""Build the compiled loops and copy the golden files; pyproject.toml has all else about the package."""

import os
import shutil
import sys
import sysconfig
from copy import copy
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py


class BuildWithGoldenFiles(build_py):
    """Copies golden/ into the package that is built: an installed copy has the golden files too."""

    def run(self) -> None:
        super().run()
        folder = Path(self.build_lib, "reproml/pipeline/golden_files")
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier build
        folder.mkdir(parents=True)
        files = glob("golden/*.json")
        if not files:
            raise SystemExit("there are no golden files to copy: build in the project's folder")
        for file in files:
            shutil.copy(file, folder)
        for file in glob("golden/confirmations/*/*.json"):
            target = folder / Path(file).relative_to("golden")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)


class BuildAtOnce(build_ext):
    """Builds the libraries at once, each with a folder of its own for object files of the same names."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.parallel = True

    def build_extension(self, ext: Extension) -> None:
        own = copy(self)
        own.build_temp = os.path.join(self.build_temp, ext.name)
        super(BuildAtOnce, own).build_extension(ext)


# Their functions are called for float32 operands alone (kernels.py lists them).
BINARY32_ONLY = {
    "fingerprint.c",
    "gamma_draws.c",
    "matrices.c",
    "normalization.c",
    "optimizer_formulas.c",
    "partial_sums.c",
    "recurrent.c",
    "residues.c",
}


def sources(precision: int) -> list[str]:
    """Return the files of the loops that round to numbers of this precision."""
    files = sorted(glob("reproml/arithmetic/csrc/*.c"))
    return [x for x in files if precision == 24 or os.path.basename(x) not in BINARY32_ONLY]


# The loops round to binary32; built again with another PRECISION, to bfloat16 and float16.
LOOPS = [
    Extension(
        f"reproml.arithmetic._kernels{name}",
        sources(precision),
        depends=sorted(glob("reproml/arithmetic/csrc/*.h")),
        define_macros=[("PRECISION", str(precision))],
        extra_compile_args=[
            "-O3",
            "-ffp-contract=off",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-Wno-psabi",  # vectors are passed between inlined functions only
        ],
        libraries=["m", "pthread"],
        py_limited_api=True,  # one library for every Python version, whose interface it does not use
        optional=True,  # without a compiler the package installs too and is slower
    )
    for name, precision in (("", 24), ("_bfloat16", 8), ("_float16", 11))
]

# One wheel for every Python since 3.9, except those without the global lock: they have no stable interface.
ONE_WHEEL = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"py_limited_api": "cp39"}

setup(
    cmdclass={"build_py": BuildWithGoldenFiles, "build_ext": BuildAtOnce},
    # The loops are written in GNU C, which Microsoft's compiler does not read.
    ext_modules=[] if sys.platform == "win32" else LOOPS,
    options={"bdist_wheel": ONE_WHEEL},
)
