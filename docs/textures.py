"""Cut three photographs of scikit-image into a folder of 768 pictures: textures/train/CLASS/*.png and textures/test/.

The photographs are brick (cc0textures.com), grass (DeviantArt) and gravel (cc0textures.com), all CC0. The right quarter
of each is the test split. The pictures have 32 x 32 pixels and are grey.
"""

from pathlib import Path

from PIL import Image
from skimage import data

for name in ("brick", "grass", "gravel"):
    photograph = Image.fromarray(getattr(data, name)())  # 512 x 512 pixels
    for left in range(0, 512, 32):
        folder = Path("textures", "train" if left < 384 else "test", name)
        folder.mkdir(parents=True, exist_ok=True)
        for top in range(0, 512, 32):
            photograph.crop((left, top, left + 32, top + 32)).save(folder / f"{top:03}-{left:03}.png")
