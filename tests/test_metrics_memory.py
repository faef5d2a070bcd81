"""What the figures of merit keep: peak memory at 50,000 images within 300 MB of that at 1,000.

Every class whose packages are installed is measured, on random data made batch by batch, by the largest resident size
of a process forked for each measurement; networks that extract features hold nothing of the data and are left out. The
short form has 6-pixel images, 16 latent numbers and 32 features, and fewer images where the time grows faster than
their number; the slow one has 32-pixel images, latents of 128 numbers and Inception's 2,048 features.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = '''
import json, os, sys
from pathlib import Path
import torch
from ctrl_csc_hf.metrics import *

sizes = json.loads(sys.argv[1])
BATCH = 250

def pair(*shape):
    first = torch.randn(BATCH, *shape)
    return first, first + 0.3 * torch.randn(BATCH, *shape)

def pixels():
    return tuple(batch.clamp(-1, 1) for batch in pair(3, sizes["side"], sizes["side"]))

def labelled():
    return torch.randn(BATCH, sizes["latents"]), torch.randint(10, (BATCH,))

DATA = {
    PeakSignalToNoiseRatio: pixels,
    StructuralSimilarity: pixels,
    FrechetDistance: lambda: pair(sizes["features"]),
    KernelDistance: lambda: pair(sizes["features"]),
    InceptionScore: lambda: (torch.randn(BATCH, 10),),
    ClosedLoopConsistency: lambda: pair(sizes["latents"]),
    CodeSparsity: lambda: (pair(8, 4, 4),),
    LatentSpectrum: lambda: pair(sizes["latents"]),
    LatentProbe: labelled,
}

class Hoard:
    """Keeps all: what a measurement must see."""
    def __init__(self):
        self.kept = []
    def update(self, *batch):
        self.kept.append(batch)
    def compute(self):
        pass

DATA[Hoard] = pixels

def peak(kind, count):
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        with open(reading) as pipe:
            answer = float(pipe.read())
        os.wait()
        return answer
    statistic = LatentProbe(10) if kind is LatentProbe else kind()
    for _ in range(count // BATCH):
        statistic.update(*DATA[kind]())
        if kind is LatentProbe:
            statistic.fit_update(*DATA[kind]())
    statistic.compute()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    os.write(writing, str(int(line.split()[1]) / 1024).encode())
    os._exit(0)

torch.set_num_threads(1)  # threads do not live through a fork
import torchmetrics.functional.image
growth = {
    kind.__name__: peak(kind, sizes["counts"].get(kind.__name__, sizes["count"])) - peak(kind, 1000) for kind in DATA
}
print(json.dumps(growth))
'''


def growth_in_megabytes(**sizes: Any) -> dict[str, float]:
    command = [sys.executable, "-c", SCRIPT, json.dumps(sizes)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    growth = json.loads(result.stdout)
    kept = (sizes["counts"].get("Hoard", sizes["count"]) - 1000) * 2 * 3 * sizes["side"] ** 2 * 4 / 2**20
    assert growth.pop("Hoard") > 0.95 * kept, "the measurement does not see what is kept"
    assert len(growth) == 9
    return growth


pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the resident size as Linux has it"
)


def test_memory_grows_by_less_than_its_share_of_300_megabytes_for_50000_images() -> None:
    """A latent here has an eighth of the numbers; the few images of three classes have that share of 300 MB, too."""
    counts = {"StructuralSimilarity": 10_000, "ClosedLoopConsistency": 10_000, "LatentProbe": 5_000}
    growth = growth_in_megabytes(side=6, latents=16, features=32, count=50_000, counts=counts)
    for name, megabytes in growth.items():
        assert megabytes < 300 * counts.get(name, 50_000) / 50_000, growth


@pytest.mark.slow
def test_memory_at_50000_images_of_full_size_is_within_300_megabytes_of_that_at_1000() -> None:
    growth = growth_in_megabytes(side=32, latents=128, features=2048, count=50_000, counts={"Hoard": 2_000})
    print({name: round(megabytes) for name, megabytes in growth.items()})
    assert max(growth.values()) < 300, growth
