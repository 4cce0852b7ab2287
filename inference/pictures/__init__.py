"""Requests and their pictures: what files and commands ask for, made, written and laid side by side."""
