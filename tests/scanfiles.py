"""Scans written for tests, as scanners and other programs write them."""

from pathlib import Path

import gdcm
import numpy as np
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    RLELossless,
    generate_uid,
)

SPACING = (0.7, 0.8, 1.25)
GDCM = {  # syntaxes that pydicom can't write
    JPEGLosslessSV1: gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    JPEG2000Lossless: gdcm.TransferSyntax.JPEG2000Lossless,
}
ORIGIN = (-30.0, 12.0, -200.0)


def values(slices=6, rows=20, columns=24, seed=0):
    """Random HU of a scan (slices, rows, columns), from air to bone."""
    return np.random.default_rng(seed).integers(-1000, 1000, (slices, rows, columns), dtype=np.int16)


def write_series(
    folder,
    hu,
    spacing=SPACING,
    origin=ORIGIN,
    direction=None,
    names=None,
    series="",
    syntax=ExplicitVRLittleEndian,
    change=lambda dataset, index: None,
):
    """Write a DICOM series with a file for each slice, under shuffled names, and return its files in slice order.

    ``spacing`` is x, y, z; the columns of ``direction`` are unit vectors along x, y, z of ``hu``. ``change`` may alter
    each dataset before it is written; its pixels are stored values, HU + 1024.
    """
    folder.mkdir(parents=True, exist_ok=True)
    direction = np.eye(3) if direction is None else np.asarray(direction, float)
    numbers = np.random.default_rng(len(hu)).permutation(len(hu))
    files = [folder / name for name in names or [f"{number:04d}.dcm" for number in numbers]]
    uids = {"SeriesInstanceUID": series or generate_uid(), "StudyInstanceUID": generate_uid()}
    for index, (file, plane) in enumerate(zip(files, hu, strict=True)):
        dataset = _slice(plane, spacing, direction, syntax, uids)
        dataset.ImagePositionPatient = list(np.round(origin + direction[:, 2] * spacing[2] * index, 6))
        dataset.InstanceNumber = index + 1
        change(dataset, index)
        _save(dataset, file, syntax)
    return files


def _slice(plane, spacing, direction, syntax, uids):
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax.is_compressed else syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    for name, value in {
        **uids,
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "PatientID": "LIDC-IDRI-0001",
        "SeriesDescription": "CHEST LUNG 1.25",
        "PixelSpacing": [spacing[1], spacing[0]],
        "ImageOrientationPatient": list(np.round(direction[:, :2].T.ravel(), 6)),
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 0,
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "RescaleType": "HU",
    }.items():
        setattr(dataset, name, value)
    dataset.Rows, dataset.Columns = plane.shape
    stored = (plane.astype(int) + 1024).astype("<u2" if syntax.is_little_endian else ">u2")
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset


def _save(dataset, file, syntax):
    if syntax == RLELossless:
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(file, enforce_file_format=True)
    if syntax in GDCM:
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(file))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(GDCM[syntax]))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        writer.SetFileName(str(file))
        assert writer.Write()


def write_volume(path: Path, hu, spacing=SPACING, origin=ORIGIN, direction=None, compressed=False):
    """Write a volume file of the type that its name says; ``direction`` as for a series."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(np.ravel(np.eye(3) if direction is None else direction).astype(float).tolist())
    sitk.WriteImage(image, str(path), compressed)
    return path
