"""Index a folder of DICOM and NIfTI, and say what is in it.

python workflows/index.py /archive/export data/index
"""

import sys

import medssl


def main() -> None:
    """Index the folder given first into the folder given second."""
    folder, out = sys.argv[1:]
    index = medssl.index_scans(folder, out)
    print(index.accepted.groupby(["modality", "dims"]).size().to_string())
    scan = medssl.load_scan(index, index.accepted["scan_key"].iloc[0])
    print("the first scan:", tuple(scan.shape), "affine (voxel to RAS mm):")
    print(scan.affine.numpy())


if __name__ == "__main__":
    main()
