"""Errors of hardware and disks, told apart from errors of the program and of the user."""
