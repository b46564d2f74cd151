"""Two packages from two folders, and the C++ kernels; everything else stands in pyproject.toml.

`kernels/` is a container without `__init__.py`: Hugging Face publishes a package named `kernels`,
which a package of that name at the root of the repository would shadow.

The C++ kernels are a plain shared library, without Python's or PyTorch's headers: it serves every
version of both. Each source is compiled for its own instruction set. Without a compiler
the packages are installed without it, and `backend="cpp"` says so.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("kernels", "csrc")
# No contraction: a compiler that fuses a product and a sum in one copy of a loop and not in another
# would let the bits of a result depend on where a row lies.
FLAGS = [
    *("-g0", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-exceptions", "-fno-rtti", "-Wall", "-Wextra"),
]
# It takes two thirds of the time of -O3, and as vectors are written by hand the code is as fast
# (AVX2, all losses, interleaved pairs: 0.88 to 1.18, median 1.01). No other level was compared.
FAST_ENOUGH = {"dispatch": "-O2", "avx2": "-O2"}
LEVELS = {"plain": [], "dispatch": []}
NEWEST = "avx512bf16"
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    sets = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq")
    # GCC 12 takes the undefined operand of its own AVX-512 headers for an uninitialised one.
    quiet = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    LEVELS["avx512"] = [*(f"-m{x}" for x in sets), *quiet]
    LEVELS[NEWEST] = [*LEVELS["avx512"], "-mavx512bf16"]
    # Whatever CFLAGS ask for: a level is for every machine that has its instructions.
    LEVELS = {level: ["-march=x86-64", *flags] for level, flags in LEVELS.items()}


class BuildKernels(build_ext):
    """One object a level, one library."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))

        def compiled(level: str, *more: str) -> list[str]:
            return self.compiler.compile(
                [str(SOURCES / f"{level}.cpp")],
                output_dir=self.build_temp,
                extra_postargs=[FAST_ENOUGH.get(level, "-O3"), *FLAGS, *LEVELS[level], *more],
                depends=ext.depends,
            )

        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                jobs = {level: pool.submit(compiled, level) for level in LEVELS}
            objects = []
            if (
                NEWEST in jobs and jobs[NEWEST].exception()
            ):  # a compiler older than the instructions
                del jobs[NEWEST]
                jobs.pop("dispatch")
                objects += compiled("dispatch", "-DDISTILFAST_WITHOUT_AVX512BF16")
            objects += [path for job in jobs.values() for path in job.result()]
            if any(b"__kmpc_" in Path(path).read_bytes() for path in objects):
                raise OSError("clang's OpenMP is not the one that PyTorch brings; set CXX=g++")
            # Without an OpenMP runtime: cpp.py hands in PyTorch's.
            self.compiler.link_shared_object(objects, str(target), libraries=["m"], target_lang="c")
        except Exception as error:  # no compiler, or one that cannot: each kind has its own
            target.unlink(missing_ok=True)
            self.warn(f"distilfast: the C++ kernels are left out, they could not be built: {error}")

    def copy_extensions_to_source(self) -> None:
        """Into an editable install what was built, which may be nothing."""
        if Path(self.build_lib, self.get_ext_filename(KERNELS.name)).exists():
            super().copy_extensions_to_source()
        else:  # a library of older sources would be used
            Path("kernels", self.get_ext_filename(KERNELS.name)).unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


class PlatformWheel(bdist_wheel):
    """The library knows nothing of Python: one wheel a platform serves every version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


KERNELS = Extension(
    "distilfast_kernels._cpp",
    sources=[str(SOURCES / f"{level}.cpp") for level in LEVELS],
    depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
    language="c++",
)

setup(
    packages=[
        *find_packages(include=["distilfast", "distilfast.*"]),
        "distilfast.recipes",
        "distilfast_kernels",
    ],
    package_dir={
        "distilfast": "distilfast",
        "distilfast.recipes": "configs",
        "distilfast_kernels": "kernels/distilfast_kernels",
    },
    package_data={
        "distilfast": ["py.typed"],
        "distilfast.report": ["*.j2"],
        "distilfast.recipes": ["*.yaml"],
        "distilfast_kernels": ["py.typed"],
    },
    ext_modules=[KERNELS],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
