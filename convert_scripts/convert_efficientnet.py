"""Convert EfficientNets into folders that `local-dir:` loads, each with a model card.

python convert_scripts/convert_efficientnet.py efficientnet_b0 tf_efficientnetv2_s --output out/
"""

from command import main

if __name__ == "__main__":
    main("efficientnet", __doc__)
