/* Deliberately empty: see linux/kconfig.h. */
