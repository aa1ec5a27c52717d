import gzip
import itertools
import os
import re
import shutil

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    RLELossless,
)

from nodules.data import scans
from nodules.errors import InputError
from scanfiles import ORIGIN, SPACING, values, write_series, write_volume

SUFFIXES = [".mhd", ".mha", ".nrrd", ".nhdr", ".nii", ".nii.gz"]
COMPRESSED = [RLELossless, JPEGLosslessSV1, JPEG2000Lossless]
TURNS = [
    np.eye(3)[:, axes] * signs
    for axes in itertools.permutations(range(3))
    for signs in itertools.product([1, -1], repeat=3)
]


def tilted(degrees):
    """Rotated about the patient's left-right axis."""
    a = np.radians(degrees)
    return np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])


def refused(path, capfd):
    """The message by which a scan is refused: one line, and nothing on standard error beside it."""
    with pytest.raises(InputError) as caught:
        scans.only(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400 + len(str(path)) and "; " in message and str(path) in message
    assert capfd.readouterr().err == ""
    return message


def only_in(index, **tags):
    """Change tags of one slice, or of all if the index is None; None removes a tag."""

    def change(dataset, at):
        if index in (at, None):
            for name, value in tags.items():
                if value is None:
                    delattr(dataset, name)
                else:
                    setattr(dataset, name, value)

    return change


def check_places(scan, hu, spacing, origin, direction, tolerance=0.01):
    """Each voxel of what was written is found at the same place in mm, and the scan is upright."""
    size = np.array(hu.shape[::-1])
    voxels = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), axis=-1).reshape(-1, 3)
    mm = np.asarray(origin) + (voxels * spacing) @ np.asarray(direction).T
    x, y, z = np.rint(scan.voxel(mm)).astype(int).T
    assert np.abs(scan.mm(np.stack([x, y, z], axis=1)) - mm).max() < tolerance
    assert np.array_equal(scan.hu[z, y, x], hu[tuple(voxels[:, ::-1].T)])
    assert (scan.direction.diagonal() > 0.5).all() and scan.hu.dtype == np.int16 and scan.hu.flags.c_contiguous


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("index", [0, 7])
def test_a_series_is_read_in_the_order_of_its_positions_whatever_its_names(tmp_path, syntax, index):
    hu = values(7 + index)
    files = write_series(tmp_path / "a" / "b", hu, syntax=syntax)
    assert files != sorted(files)
    scan = scans.only(tmp_path)
    assert np.array_equal(scan.hu, hu) and np.allclose(scan.spacing, SPACING) and np.allclose(scan.origin, ORIGIN)
    assert np.array_equal(scan.direction, np.eye(3)) and scan.patient == "LIDC-IDRI-0001" and scan.study
    check_places(scan, hu, SPACING, ORIGIN, np.eye(3))


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("syntax", COMPRESSED, ids=["RLE", "JPEG lossless", "JPEG 2000"])
def test_a_compressed_series_gives_the_same_values(tmp_path, syntax, signed):
    hu = values()

    def change(dataset, index):
        if signed:
            dataset.PixelRepresentation, dataset.RescaleIntercept = 1, 0
            dataset.PixelData = hu[index].tobytes()

    files = write_series(tmp_path, hu, syntax=syntax, change=change)
    assert pydicom.dcmread(files[0]).file_meta.TransferSyntaxUID == syntax
    assert np.array_equal(scans.only(tmp_path).hu, hu)


@pytest.mark.parametrize("turn", TURNS, ids=range(48))
def test_a_voxel_keeps_its_place_in_the_patient_whatever_way_a_scan_is_stored(tmp_path, turn):
    hu, turn = values(4, 5, 6), turn @ tilted(5)
    write_volume(tmp_path / "scan.mha", hu, direction=turn)
    check_places(scans.only(tmp_path / "scan.mha"), hu, SPACING, ORIGIN, turn)
    if np.linalg.det(turn) < 0:  # a series has no direction of its slices of its own
        hu = hu[::-1]
        turn = turn * [1, 1, -1]
    write_series(tmp_path / "series", hu, direction=turn)
    check_places(scans.only(tmp_path / "series"), hu, SPACING, ORIGIN, turn)


def test_volumes_are_turned_as_simpleitk_turns_them(tmp_path):
    for number, turn in enumerate(TURNS):
        path = write_volume(tmp_path / f"{number}.nrrd", values(4, 5, 6), direction=turn)
        image, scan = sitk.DICOMOrient(sitk.ReadImage(path), "LPS"), scans.only(path)
        assert np.array_equal(scan.hu, sitk.GetArrayFromImage(image)) and np.allclose(scan.origin, image.GetOrigin())
        assert np.allclose(scan.spacing, image.GetSpacing())


@given(st.lists(st.floats(-500, 500), min_size=3, max_size=3), st.sampled_from(TURNS), st.floats(-40, 40))
@settings(max_examples=50, deadline=None)
def test_voxels_and_millimetres_are_each_others_inverse(mm, turn, degrees):
    scan = scans.Scan(values(2), SPACING, np.array(ORIGIN), turn @ tilted(degrees), "", "", "")
    assert np.allclose(scan.mm(scan.voxel(mm)), mm) and scan.voxel([[mm]]).shape == (1, 1, 3)
    assert np.allclose(scan.voxel(ORIGIN), 0)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_volume_is_read(tmp_path, suffix, compressed):
    hu = values()
    write_volume(tmp_path / f"1.2.3{suffix}", hu, compressed=compressed)
    (found,) = scans.find(tmp_path)
    assert (found.series, found.study, found.patient) == ("1.2.3", "", "1.2.3")
    scan = scans.read(found)
    assert np.array_equal(scan.hu, hu)
    check_places(scan, hu, SPACING, ORIGIN, np.eye(3))


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int32])
def test_values_of_a_volume_are_rounded_and_what_is_no_measurement_is_air(tmp_path, kind):
    hu = values().astype(kind)
    hu[0, 0, :4] = [-2000, -3024, 40000, -1024]
    hu[0, 1, :2] += 0.4 if kind != np.int32 else 0
    expected = np.clip(np.rint(hu), -1024, 32767)
    assert np.array_equal(scans.only(write_volume(tmp_path / "a.nii.gz", hu)).hu, expected)


def test_several_scans_are_found_and_one_is_chosen_by_the_end_of_its_series(tmp_path):
    series = ["1.2.840.1001", "1.2.840.2001", "1.2.840.2002"]
    for number, uid in enumerate(series):
        write_series(tmp_path, values(3 + number), series=uid, names=[f"{number}{i}" for i in range(3 + number)])
    write_volume(tmp_path / "deep" / "er" / "scan.mhd", values())
    found = scans.find(tmp_path)
    assert [scan.series for scan in found] == [*series, "scan"]
    assert [len(scan.files) for scan in found] == [3, 4, 5, 1]
    assert found[1].described == "4 slices, CHEST LUNG 1.25"
    assert len(scans.only(tmp_path, "2001").hu) == 4 and len(scans.only(tmp_path, "1.2.840.2002").hu) == 5
    with pytest.raises(InputError, match=r"contains 4 scans \(0.1001 \(3 slices, CHEST LUNG 1.25\).*choose one"):
        scans.only(tmp_path)
    with pytest.raises(InputError, match="contains 2 scans"):
        scans.only(tmp_path, "001")
    with pytest.raises(InputError, match=r"no series ends in '77' \(found: .*2002"):
        scans.only(tmp_path, "77")


def test_a_series_is_chosen_by_its_full_name_even_if_another_ends_in_it(tmp_path):
    for name, slices in (("12", 3), ("2", 4)):
        write_volume(tmp_path / f"{name}.nrrd", values(slices))
    assert len(scans.only(tmp_path, "2").hu) == 4


def test_a_list_of_many_scans_is_cut_off(tmp_path):
    for number in range(20):
        write_volume(tmp_path / f"{number}.nrrd", values(3))
        write_volume(tmp_path / "again" / f"{number}.nrrd", values(3))
    with pytest.raises(InputError, match=r"contains 40 scans \(([^,]*, ){6}\.\.\.\)"):
        scans.only(tmp_path)


def test_other_files_beside_a_scan_do_not_matter(tmp_path):
    hu = values()
    files = write_series(tmp_path, hu)
    (tmp_path / "LICENSE").write_text("DICM")
    (tmp_path / "notes.xml").write_bytes(b"\x89PNG" + bytes(500))
    (tmp_path / "._scan.mhd").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "no_preamble.dcm").write_bytes(files[0].read_bytes()[132:])
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.dcm").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    index = pydicom.dcmread(files[0], stop_before_pixels=True)
    index.file_meta.MediaStorageSOPClassUID = scans.DICOMDIR
    index.save_as(tmp_path / "DICOMDIR")
    write_series(tmp_path / "xray", hu[:2], change=only_in(None, Modality="DX"))
    write_series(tmp_path / "scout", hu[:2], change=only_in(None, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    write_series(tmp_path / "saved", hu[:1])
    (found,) = scans.find(tmp_path)
    assert sorted(found.files) == sorted(files) and np.array_equal(scans.read(found).hu, hu)


def test_a_folder_without_scans_has_none(tmp_path, capfd):
    (tmp_path / "notes.txt").write_text("nothing")
    assert scans.find(tmp_path) == []
    assert "contains no CT scan" in refused(tmp_path, capfd)
    assert "neither a DICOM file nor one of .mhd" in refused(tmp_path / "notes.txt", capfd)
    assert "no such file or folder" in refused(tmp_path / "nowhere", capfd)
    with pytest.raises(InputError):
        scans.find(tmp_path / ("x" * 5000))


def test_of_slices_at_one_position_the_first_is_kept(tmp_path):
    hu = values()
    write_series(tmp_path / "b", hu, series="1.2", change=lambda d, i: only_in(i, InstanceNumber=i + 1)(d, i))
    write_series(tmp_path / "a", hu[::-1], series="1.2", change=lambda d, i: only_in(i, InstanceNumber=i + 90)(d, i))
    assert np.array_equal(scans.only(tmp_path).hu, hu)


def test_a_localiser_among_the_slices_is_left_out(tmp_path):
    scout = only_in(5, ImageType=["DERIVED", "LOCALIZER"], ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    hu = values()
    write_series(tmp_path, hu, change=scout)
    assert np.array_equal(scans.only(tmp_path).hu, hu[:5])


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_padding_and_what_lies_below_air_become_air(tmp_path, syntax):
    hu = values().astype(int)
    hu[:, 0], hu[:, 1], hu[:, 2, :3] = -2000, 2040, [2010, 2015, 2020]
    signed = (hu + 0).astype("<i2" if syntax.is_little_endian else ">i2")

    def change(dataset, index):
        dataset.PixelRepresentation, dataset.RescaleIntercept = 1, 0
        dataset.PixelData = signed[index].tobytes()
        if index:
            dataset.PixelPaddingValue = -2000 if index == 1 else 2010
        if index > 2:
            dataset.PixelPaddingRangeLimit = 2015

    write_series(tmp_path, values(), syntax=syntax, change=change)
    read = scans.only(tmp_path).hu
    assert (read[:, 0] == scans.AIR).all() and (read[:, 1] == 2040).all()
    assert read[1, 2, :3].tolist() == [2010, 2015, 2020] and read[2, 2, :3].tolist() == [-1024, 2015, 2020]
    assert read[3, 2, :3].tolist() == [-1024, -1024, 2020] and np.array_equal(read[:, 3:], hu[:, 3:])


def test_a_negative_padding_value_stored_as_a_positive_number_is_understood(tmp_path):
    hu = values().astype("<i2")
    hu[:, 0] = -500

    def change(dataset, index):
        dataset.PixelRepresentation, dataset.RescaleIntercept = 1, 0
        dataset.PixelData = hu[index].tobytes()
        dataset.add_new("PixelPaddingValue", "US", 65536 - 500)

    write_series(tmp_path, hu, change=change)
    assert (scans.only(tmp_path).hu[:, 0] == scans.AIR).all()


def test_each_slice_is_rescaled_by_its_own_header(tmp_path):
    hu = values()

    def change(dataset, index):
        dataset.RescaleSlope, dataset.RescaleIntercept = "0.5", str(-1024 + index)

    write_series(tmp_path, hu, change=change)
    expected = np.rint((hu + 1024.0) * 0.5 - 1024 + np.arange(len(hu))[:, None, None])
    assert np.array_equal(scans.only(tmp_path).hu, np.maximum(expected, scans.AIR))


def test_unused_bits_of_the_pixels_do_not_count(tmp_path):
    hu = values()
    extra = (hu.astype(int) + 1024 | 0x4000).astype("<u2")

    def change(dataset, index):
        dataset.BitsStored, dataset.HighBit, dataset.PixelData = 12, 11, extra[index].tobytes()

    write_series(tmp_path, hu, change=change)
    assert np.array_equal(scans.only(tmp_path).hu, hu)


def test_rounded_positions_and_a_hardly_visible_tilt_are_accepted(tmp_path):
    def change(dataset, index):
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, y + 0.01 * index, round(z, 1)]

    write_series(tmp_path, values(30), spacing=(0.7, 0.7, 0.625), change=change)
    assert scans.only(tmp_path).spacing[2] == pytest.approx(0.625, abs=0.004)


def shifted(mm):
    def change(dataset, index):
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, y + mm * index, z]

    return change


def squeezed(dataset, index):
    x, y, z = dataset.ImagePositionPatient
    dataset.ImagePositionPatient = [x, y, z + (0.5 if index == 3 else 0)]


def cut(dataset, index):
    if index == 2:
        dataset.PixelData = dataset.PixelData[:-100]


def small(dataset, index):
    if index == 2:
        dataset.Rows, dataset.PixelData = 10, dataset.PixelData[: len(dataset.PixelData) // 2]


REFUSED = {
    "its modality is PT, not CT": only_in(None, Modality="PT"),
    "its modality is MR, not CT": only_in(2, Modality="MR"),
    "a localiser, not a scan": only_in(None, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
    "many slices in one DICOM file": only_in(None, SOPClassUID=scans.MULTIFRAME),
    "many slices in one DICOM file, which": only_in(1, NumberOfFrames=3),
    "its pixel spacing is not that of": only_in(2, PixelSpacing=[0.6, 0.6]),
    "its orientation is not that of": only_in(2, ImageOrientationPatient=[0, 1, 0, -1, 0, 0]),
    "its image size is not that of": small,
    "not a readable DICOM file (The number of bytes": cut,
    "PixelSpacing missing": only_in(2, PixelSpacing=None),
    "ImagePositionPatient missing": only_in(2, ImagePositionPatient=None),
    "ImageOrientationPatient missing": only_in(None, ImageOrientationPatient=None),
    "Rows missing": only_in(2, Rows=None),
    "RescaleSlope, RescaleIntercept missing": only_in(2, RescaleSlope=None, RescaleIntercept=None),
    "RescaleIntercept missing": only_in(2, RescaleIntercept=""),
    "RescaleSlope 0 or": only_in(2, RescaleSlope=0),
    "not a pair of perpendicular unit vectors": only_in(None, ImageOrientationPatient=[1, 0, 0, 0.1, 0.99, 0]),
    "not a pair of perpendicular unit": only_in(None, ImageOrientationPatient=[1, 0, 0, 0, 2, 0]),
    "ImageOrientationPatient is damaged": only_in(2, ImagePositionPatient=[1, 2]),
    "which is not between 0 and 20": only_in(None, PixelSpacing=[0, 0.7]),
    "which is not between 0 and 20;": only_in(None, PixelSpacing=[70, 70]),
    "pixels of 16 bits, MONOCHROME1": only_in(None, PhotometricInterpretation="MONOCHROME1"),
    "pixels of 8 bits": only_in(None, BitsAllocated=8, BitsStored=8, HighBit=7),
    "pixels of 16 bits, MONOCHROME2, not": only_in(None, BitsStored=12, HighBit=15),
    "its pixels are 'MGML', not Hounsfield": only_in(None, RescaleType="MGML"),
    "no lung, since hardly any value from -24": only_in(None, RescaleIntercept=0),
    "slices shift sideways by 1.2 mm": shifted(0.25),
    "unevenly spaced, 0.75 to 1.75 mm": squeezed,
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_series_that_is_no_whole_ct_is_refused(tmp_path, capfd, message):
    hu = np.maximum(values(), -900) if "no lung" not in message else np.abs(values())
    write_series(tmp_path, hu, change=REFUSED[message])
    assert message.replace("from -24", "from 1024") in refused(tmp_path, capfd)


def test_missing_slices_are_named(tmp_path, capfd):
    files = write_series(tmp_path, values(12))
    for index in (3, 7, 8):
        files[index].unlink()
    message = refused(tmp_path, capfd)
    assert f"(2.50 mm after {files[2].name}, 3.75 mm after {files[6].name}, where 1.25 mm are usual)" in message


def test_a_single_slice_is_refused(tmp_path, capfd):
    files = write_series(tmp_path, values())
    assert "a single slice, not a scan; give the folder" in refused(files[0], capfd)


def test_a_syntax_that_cannot_be_decoded_is_named(tmp_path, capfd):
    def change(dataset, index):
        dataset.file_meta.TransferSyntaxUID = HTJ2KLossless
        dataset.PixelData = pydicom.encaps.encapsulate([b"1234"])

    write_series(tmp_path, values(), change=change)
    assert "High-Throughput JPEG 2000 Image Compression (Lossless Only), which can't be decoded" in refused(
        tmp_path, capfd
    )


def test_a_deflated_file_is_refused_before_it_unfolds(tmp_path, capfd):
    write_series(tmp_path, values(), syntax=DeflatedExplicitVRLittleEndian)
    assert "deflated as a whole" in refused(tmp_path, capfd)


def test_a_file_that_begins_like_dicom_but_is_damaged_is_named(tmp_path, capfd):
    files = write_series(tmp_path, values())
    files[3].write_bytes(files[3].read_bytes()[:200])
    message = refused(tmp_path, capfd)
    assert files[3].name in message and "no SeriesInstanceUID" in message
    files[3].write_bytes(bytes(128) + b"DICM" + b"\xff" * 300)
    assert files[3].name in refused(tmp_path, capfd)


@pytest.mark.parametrize("syntax", COMPRESSED, ids=["RLE", "JPEG lossless", "JPEG 2000"])
def test_a_compressed_file_that_is_cut_off_is_refused(tmp_path, capfd, syntax):
    files = write_series(tmp_path, values(), syntax=syntax)
    files[3].write_bytes(files[3].read_bytes()[:-300])
    assert files[3].name in refused(tmp_path, capfd)


def test_absurd_sizes_are_refused_before_memory_is_taken(tmp_path, capfd):
    write_series(tmp_path / "a", values(), change=only_in(None, Rows=60000, Columns=60000))
    assert "6 slices of 60000 x 60000 pixels" in refused(tmp_path / "a", capfd)
    path = write_volume(tmp_path / "a.mhd", values())
    path.write_text(path.read_text().replace("DimSize = 24 20 6", "DimSize = 2048 2048 2000"))
    assert "2000 slices of 2048 x 2048 pixels" in refused(path, capfd)
    path.write_text(path.read_text().replace("DimSize = 2048 2048 2000", "DimSize = 512 512 500"))
    assert "claims 262144000 bytes in a file of" in refused(path, capfd)


VOLUMES = {
    "2 dimensions": lambda folder: write_volume(folder / "a.mha", values()) and flat(folder / "a.mha"),
    "4 dimensions": lambda folder: four(folder / "a.nii.gz"),
    "3 values of a voxel": lambda folder: colour(folder / "a.nrrd"),
    "a single slice": lambda folder: write_volume(folder / "a.nii", values(1)),
    "which is not between 0 and 20": lambda folder: write_volume(folder / "a.mhd", values(), spacing=(1, 1, 25)),
    "contains NaN": lambda folder: write_volume(folder / "a.nii", np.full((3, 9, 9), np.nan, np.float32)),
    "no lung, since hardly any value from 0 to 255": lambda folder: write_volume(
        folder / "a.nrrd", values().astype(np.uint8)
    ),
    "no lung, since hardly any value from -1024 to": lambda folder: write_volume(
        folder / "a.nrrd", np.where(values() < 0, -2000, values())
    ),
    "'a.raw', is missing": lambda folder: without(write_volume(folder / "a.mhd", values()), "a.raw"),
    "'a.raw.gz', is missing": lambda folder: without(write_volume(folder / "a.nhdr", values()), "a.raw.gz"),
    "in another folder, '../a.raw'": lambda folder: edited(folder / "a.mhd", "= a.raw", "= ../a.raw"),
    "in another folder, '/etc/passwd'": lambda folder: edited(folder / "a.nhdr", ": a.raw.gz", ": /etc/passwd"),
    "damaged, cut off, or not MetaImage": lambda folder: edited(folder / "a.mhd", "24 20 6", "many"),
    "damaged, cut off, or not NRRD": lambda folder: edited(folder / "a.nhdr", "24 20 6", "many"),
    "axes are not perpendicular": lambda folder: edited(folder / "a.mhd", "1 0 0 0 1 0 0 0 1", "1 0 0 1 1 0 0 0 1"),
}


def edited(path, old, new):
    write_volume(path, values(), compressed=path.suffix == ".nhdr")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def without(path, data):
    if not path.with_name(data).exists():
        write_volume(path, values(), compressed=True)
    path.with_name(data).unlink()
    return path


def flat(path):
    sitk.WriteImage(sitk.GetImageFromArray(values()[0]), path)
    return path


def four(path):
    sitk.WriteImage(sitk.GetImageFromArray(np.stack([values()] * 2), isVector=False), path)
    return path


def colour(path):
    sitk.WriteImage(sitk.GetImageFromArray(np.stack([values()] * 3, axis=-1), isVector=True), path)
    return path


@pytest.mark.parametrize("message", VOLUMES)
def test_a_volume_that_is_no_ct_in_hounsfield_units_is_refused(tmp_path, capfd, message):
    assert message in refused(VOLUMES[message](tmp_path), capfd)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_volume_that_is_cut_off_or_something_else_is_refused(tmp_path, capfd, suffix, compressed):
    path = write_volume(tmp_path / f"a{suffix}", values(), compressed=compressed)
    files = [file for file in tmp_path.iterdir() if file != path] or [path]
    files[0].write_bytes(files[0].read_bytes()[:-200])
    refused(path, capfd)
    path.write_bytes(b"<html>")
    refused(path, capfd)
    path.write_bytes(b"")
    refused(path, capfd)


def test_a_packed_volume_is_not_mistaken_for_its_neighbour(tmp_path):
    write_volume(tmp_path / "a.nii", values(5))
    assert len(scans.only(write_volume(tmp_path / "a.nii.gz", values(7))).hu) == 7


def test_a_packed_bomb_is_refused(tmp_path, capfd):
    with gzip.open(tmp_path / "a.nii.gz", "wb") as file:
        file.write(bytes(30_000_000))
    assert "unfolds to more than 100 times its size" in refused(tmp_path / "a.nii.gz", capfd)


def test_reading_the_headers_of_many_files_shows_a_bar_and_leaves_nothing_behind(tmp_path, capfd):
    files = write_series(tmp_path, values(60, 4, 4))
    shutil.copy(files[0], tmp_path / "copy")
    assert len(scans.find(tmp_path)[0].files) == 61
    shown = capfd.readouterr().err
    assert "headers" in shown and re.search(r"\r *\r$", shown)
