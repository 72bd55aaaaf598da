"""Convert vision transformers into folders that `local-dir:` loads, each with a model card.

python convert_scripts/convert_vit.py vit_b_16 vit_base_patch14_dinov2 --dtype float16
"""

from command import main

if __name__ == "__main__":
    main("vit", __doc__)
