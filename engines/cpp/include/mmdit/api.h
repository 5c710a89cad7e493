// What the shared library exports; everything else in it is hidden.
#ifndef MMDIT_API_H
#define MMDIT_API_H

#if defined(_WIN32)
#define MMDIT_API
#else
#define MMDIT_API __attribute__((visibility("default")))
#endif

#endif
