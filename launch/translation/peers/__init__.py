"""One file, or folder, for each training tool whose settings can be read."""
