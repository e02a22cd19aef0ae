/* Lists a folder with a 32-bit off_t, as 32-bit programs do that were built without large file support. */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>

_Static_assert(sizeof(off_t) == 4, "off_t has 32 bits");

int main(int argc, char **argv) {
    const char *folder = argc > 1 ? argv[1] : ".";
    DIR *dir = opendir(folder);
    if (dir == NULL) {
        perror(folder);
        return 1;
    }
    int count = 0;
    errno = 0;
    while (readdir(dir) != NULL)
        count++;
    printf("%s: %d entries, errno %d (%s)\n", folder, count, errno, strerror(errno));
    return errno != 0;
}
