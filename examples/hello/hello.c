#include <stdio.h>
#include <sys/utsname.h>

int main(void) {
    struct utsname host;
    if (uname(&host) != 0) {
        perror("uname");
        return 1;
    }
    printf("Hello from %s, a program of %zu bits\n", host.machine, sizeof(void *) * 8);
    return 0;
}
