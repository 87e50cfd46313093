"""What is on the device, and when."""
