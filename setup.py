"""Build script for the compiled part. The metadata is in pyproject.toml.

The CUDA kernels of csrc/ are optional: every operator also has a PyTorch kernel, and the Python
package defines the operators' schemas. The kernels are compiled if the environment has a CUDA build
of torch, and nvcc; no GPU is needed. Environment variables:

- RASA_EXT_CUDA: ``auto`` (default), ``1`` to fail if they cannot be compiled, ``0`` to skip them.
- TORCH_CUDA_ARCH_LIST, MAX_JOBS, CUDA_HOME, CXX: read by torch.utils.cpp_extension.
"""

import os
import re
import runpy
import sys
import tomllib
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_support import extension, toolchain  # noqa: E402

# setup.py also runs to produce metadata, which needs no toolchain.
BUILDING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}


class BuildWithReason(build_py):
    """A build_py that stores why there are no kernels, for ``cuda_status``."""

    reason = ""

    def run(self) -> None:
        """Copy the package, and write the reason into the copy."""
        super().run()
        if self.reason and not self.editable_mode:
            (Path(self.build_lib) / "rasa_ext" / "_no_kernels.txt").write_text(self.reason + "\n")


def arguments() -> dict:
    """Return the arguments of ``setup`` that pyproject.toml does not have."""
    mode = os.environ.get("RASA_EXT_CUDA", "auto")
    if mode not in ("0", "1", "auto"):
        raise SystemExit(f"RASA_EXT_CUDA: expected 0, 1 or auto, got {mode!r}.")
    if not BUILDING.intersection(sys.argv):
        return {}
    try:
        if mode == "0":
            raise toolchain.Missing("RASA_EXT_CUDA=0 was set")
        found = toolchain.find()
    except toolchain.Missing as missing:
        if mode == "1":
            message = f"RASA_EXT_CUDA=1, but CUDA kernels cannot be built: {missing}."
            raise SystemExit(message) from None
        print(f"rasa_ext: installing without CUDA kernels: {missing}.")
        BuildWithReason.reason = str(missing)
        return {"cmdclass": {"build_py": BuildWithReason}}
    print(f"rasa_ext: compiling CUDA kernels for torch {found.torch} with {found.cuda_home}.")
    return extension.arguments(found, ROOT)


def description() -> str:
    """Return the README for a package page, with links to the tag, or without its links.

    Links need the repository's address in pyproject.toml.
    """
    text = (ROOT / "README.md").read_text()
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    if "Repository" not in urls:
        text = re.sub(r"<picture>.*?</picture>\s*", "", text, flags=re.DOTALL)
        return re.sub(r"!?\[([^]]*)\]\((?!\w+:).*?\)", r"\1", text)
    version = runpy.run_path(str(ROOT / "rasa_ext" / "_version.py"))["__version__"]
    tag = f"v{version.partition('+')[0]}"
    raw, page = (f"{urls['Repository']}/{kind}/{tag}/" for kind in ("raw", "blob"))
    text = re.sub(r'((?:src|srcset)="|!\[[^]]*\]\()(?!\w+:)', rf"\1{raw}", text)
    text = text.replace("](#", f"]({page}README.md#")
    return re.sub(r"\]\((?!\w+:)", f"]({page}", text)


readme = {"long_description": description(), "long_description_content_type": "text/markdown"}
setup(**readme, **arguments())
