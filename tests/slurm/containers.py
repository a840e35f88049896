"""Nodes of the test cluster on which Python exists only in a container, and the lines of site.env that enter it.

Apptainer and pyxis are stand-ins (`standins/`): a mount namespace with another root directory. This shows which commands run
inside, what they see there, and which signals reach them. It does not show Apptainer, enroot or pyxis themselves. Where pyxis and
enroot are installed, PYXIS_PLUGIN and PYXIS_IMAGE make the same tests use them (`is_real`).
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import sysconfig
from pathlib import Path

from tests.conftest import REPO
from tests.slurm.cluster import SBIN, Cluster, Host

STANDINS = Path(__file__).parent / "standins"
KINDS = ("apptainer", "pyxis")
# A tmpfs with the system directories of the machine, a Python in /opt/python and the packages in /opt/venv, as an image has them.
MAKE_IMAGE = """
image=$1 python=$2 packages=$3 version=$4
mkdir -p "$image" && mount -t tmpfs tmpfs "$image"
for directory in /usr /etc /bin /sbin /lib /lib32 /lib64 /libx32; do
  if [[ -L $directory ]]; then
    ln -s "$(readlink "$directory")" "$image$directory"
  elif [[ -d $directory ]]; then
    mkdir "$image$directory" && mount --rbind "$directory" "$image$directory"
  fi
done
mkdir -p "$image"/{tmp,opt/python,opt/venv/bin} "$image/opt/venv/lib/python$version/site-packages"
mount --rbind "$python" "$image/opt/python"
mount --rbind "$packages" "$image/opt/venv/lib/python$version/site-packages"
ln -s "/opt/python/bin/python$version" "$image/opt/venv/bin/python"
for program in scontrol srun sbatch squeue scancel; do # an image has no Slurm
  if [[ -e $image/usr/bin/$program ]]; then mount --bind /dev/null "$image/usr/bin/$program"; fi
done
printf 'home = /opt/python/bin\\n' >"$image/opt/venv/pyvenv.cfg"
printf 'PATH=/opt/venv/bin:/usr/bin:/bin\\nLD_LIBRARY_PATH=/opt/python/lib\\n' >"$image/environment"
"""
HIDE = """
for path in "$@"; do
  if [[ -d $path ]]; then mount -t tmpfs tmpfs "$path"; elif [[ -e $path ]]; then mount --bind /dev/null "$path"; fi
done
"""


def pythons() -> list[str]:
    """Every Python that a program on this machine may find: those on PATH, and the environment of this process."""
    programs = {str(path.resolve()) for place in SBIN.split(os.pathsep) for path in Path(place).glob("python*")}
    environments = {str(Path(prefix).resolve()) for prefix in (sys.prefix, sys.base_prefix)} - {"/usr"}
    return [*sorted(programs), *sorted(environments)]


def move_python_into_image(host: Host, image: Path) -> None:
    """Make the image of this host, then hide every other Python in the host's own mount namespace."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    image_arguments = [str(image), sys.base_prefix, sysconfig.get_path("purelib"), version]
    for script, arguments in ((MAKE_IMAGE, image_arguments), (HIDE, pythons())):
        host.run_inside("bash", "-euc", script, "host", *arguments)


def container_lines(kind: str, image: Path, shared: Path) -> list[str]:
    """The line of slurm/site.example.env for this kind of container, with this image and this shared directory."""
    example = (REPO / "slurm/site.example.env").read_text().splitlines()
    option = {"apptainer": "CONTAINER=(", "pyxis": "--container-image="}[kind]
    (line,) = [line for line in example if line.startswith("# PYTHON=python ") and option in line]
    line, found = re.subn(r"/shared/images/minilmv2\.\w+", str(image), line.removeprefix("# "))
    assert found == 1, line
    path = [] if is_real(kind) else [f"export PATH={shlex.quote(str(STANDINS))}:$PATH"]
    return [*path, line.replace("/shared", str(shared))]


def is_real(kind: str) -> bool:
    """Whether pyxis itself is tried: PYXIS_PLUGIN names spank_pyxis.so, and PYXIS_IMAGE a squashfs file of the image."""
    return kind == "pyxis" and "PYXIS_PLUGIN" in os.environ


def load_pyxis(cluster_directory: Path) -> None:
    """Let the cluster that starts there load the plugin, where there is one."""
    if is_real("pyxis"):
        (cluster_directory / "etc").mkdir()
        (cluster_directory / "etc/plugstack.conf").write_text(f"required {os.environ['PYXIS_PLUGIN']}\n")


def hosts_of(cluster: Cluster) -> list[Host]:
    """The login node and the compute nodes."""
    return [cluster.head, *cluster.nodes.values()]
