"""Write, resume, verify and read datasets on disk."""
