# SPDX-License-Identifier: Apache-2.0
"""How images were cut out of larger ones. Sets that were cropped differently are not comparable: FID sees it.

`center-crop` is a square crop, then a resize by PIL's LANCZOS, as StyleGAN's tools and ours do it.
`center-crop-dhariwal` is ADM's: halvings by BOX, a resize by BICUBIC, then the crop.
"""
from typing import Any

ADM_CROP = "center-crop-dhariwal"


def crop_warnings(names: list[str], generated: dict[str, Any], reference_crop: str | None) -> list[str]:
    """What to say about the crops of both sides, as far as they are known.

    Args:
        names: Metrics that compare with real images.
        generated: Description of the generated images.
        reference_crop: The crop of the real images; None: unknown.
    """
    ours, found = generated.get("crop"), []
    if ours and reference_crop and ours != reference_crop:
        found.append(f"the generated images were cut by {ours}, the reference by {reference_crop}: the metrics see it, "
                     "and the numbers are comparable with no others")
    adm = [name for name in names if name.startswith("adm_")]
    if adm and reference_crop not in (None, ADM_CROP):
        found.append(f"{', '.join(adm)}: the reference was cut by {reference_crop}, ADM's is cut by {ADM_CROP}: not "
                     "comparable with numbers in papers")
    return found
