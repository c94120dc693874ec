"""What every module may use: messages and errors, files, downloads, text, devices, TensorFlow."""
