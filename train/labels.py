"""What the labels of a data set are called."""

CLASS_NAMES = {
    "fashion_mnist": ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"],
    "kmnist": ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"],
}


def class_names(data_name: str) -> list[str]:
    """One name per label of a data set; the digits 0..9 where the labels are digits."""
    return CLASS_NAMES.get(data_name, [str(digit) for digit in range(10)])
