"""What a task asks for: frozen specifications, scene layouts, instructions, success tests. Knows no simulator."""
