"""What the benches share. A bench runs as a program, which puts its folder on sys.path."""
