"""Builds the one extension module; everything else about the package stands in pyproject.toml."""

from Cython.Build import cythonize
from setuptools import Extension, setup

core = Extension(
    "gcma_shm._core",
    ["gcma_shm/_core.pyx"],
    depends=[
        "gcma_shm/_crc32c.h",
        "gcma_shm/_atomics.h",
        "gcma_shm/_races.h",
        "gcma_shm/_copy.h",
        "gcma_shm/_direct.h",
    ],
    extra_compile_args=["-O2", "-std=c11", "-Wall", "-Wno-unused-function"],
)
setup(ext_modules=cythonize([core], compiler_directives={"language_level": 3}))
