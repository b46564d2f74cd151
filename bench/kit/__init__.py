"""What the benches share. A bench is run as a program: its folder is on sys.path then."""
