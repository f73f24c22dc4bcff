"""The native decoder, which may be missing: without a compiler or libjpeg-turbo's headers, all but
it is installed.
"""

import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError


class BuildNative(build_ext):
    """Links libjpeg-turbo's archive, so that the built file needs nothing of the system; its shared
    library where that fails.
    """

    def build_extension(self, ext: Extension) -> None:
        if archive := self._archive("libjpeg.a"):
            ext.extra_objects, ext.extra_link_args = [archive], ["-Wl,--exclude-libs,ALL"]
            try:
                return super().build_extension(ext)
            except CCompilerError:
                ext.extra_objects, ext.extra_link_args = [], []
        ext.libraries = ["jpeg"]
        return super().build_extension(ext)

    def _archive(self, name: str) -> str | None:
        command = [*self.compiler.compiler[:1], f"-print-file-name={name}"]
        try:
            path = Path(
                subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return str(path) if path.is_absolute() else None


setup(
    ext_modules=[
        Extension(
            "trainer.data._native",
            ["trainer/data/_native.c"],
            define_macros=[("Py_LIMITED_API", "0x030b0000")],
            extra_compile_args=[
                "-O3",
                "-g0",
                "-ffp-contract=off",
            ],  # the same sums on every processor
            py_limited_api=True,
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
