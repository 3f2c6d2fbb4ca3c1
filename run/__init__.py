"""What a run needs beside the four files. Each file begins with what it holds."""
