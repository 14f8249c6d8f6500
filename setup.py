"""Build the compiled loops; pyproject.toml has everything else about the package."""

from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "reproml.arithmetic._kernels",
            sorted(glob("reproml/arithmetic/csrc/*.c")),
            depends=sorted(glob("reproml/arithmetic/csrc/*.h")),
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
    ]
)
