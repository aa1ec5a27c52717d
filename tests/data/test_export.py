import numpy as np
import pytest
from PIL import Image

from nodules.data import export, patches, split
from nodules.data.sources import CLASSES
from nodules.errors import InputError


def test_folders_hold_each_patch_once_under_its_split_and_class(tmp_path, own):
    np.savez(tmp_path / "own.npz", **own)
    ct = patches.read(str(tmp_path / "own.npz"))
    assigned = split.assign(ct.table)
    folder = export.to_folders(ct, assigned, tmp_path / "png")
    files = {int(path.stem): path for path in folder.rglob("*.png")}
    assert sorted(files) == list(range(40))
    for i, path in files.items():
        assert path.parts[-3:-1] == (assigned["split"][i], CLASSES[own["malignant"][i]])
    grey = np.asarray(Image.open(files[0]))
    assert grey.shape == (64, 64) and grey.dtype == np.uint8
    assert np.allclose(grey, np.clip((own["images"][0] + 1000) / 1400, 0, 1) * 255, atol=0.51)
    with pytest.raises(InputError, match="already exists"):
        export.to_folders(ct, assigned, folder)
    assert not list(tmp_path.glob(".*"))
