"""FSR in the training loops of other libraries. Each module is imported by itself, and needs its library."""
