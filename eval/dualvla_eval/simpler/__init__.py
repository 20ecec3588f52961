"""SimplerEnv's tasks on mani_skill 3: specifications, scenes, robots, success tests and scripted experts."""
