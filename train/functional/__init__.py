"""Pure functions of (config, step): order, random numbers, augmentation, models, optimizer. No ranks and no files."""
