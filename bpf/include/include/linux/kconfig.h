/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Stand-ins for the kernel headers that bcc insists on. bcc includes this file before everything else. The programs
 * use nothing but the UAPI, which bcc carries itself, so that an installed kernel's headers are never read and one
 * build serves every kernel.
 */
#ifndef EBFW_KCONFIG_H
#define EBFW_KCONFIG_H
#define CONFIG_BPF_SYSCALL 1
#define PAGE_SIZE 4096
typedef unsigned char __u8;
typedef signed char __s8;
typedef unsigned short __u16;
typedef short __s16;
typedef unsigned int __u32;
typedef int __s32;
typedef unsigned long long __u64;
typedef long long __s64;
typedef __u8 u8;
typedef __s8 s8;
typedef __u16 u16;
typedef __s16 s16;
typedef __u32 u32;
typedef __s32 s32;
typedef __u64 u64;
typedef __s64 s64;
typedef __u16 __le16, __be16;
typedef __u32 __le32, __be32;
typedef __u64 __le64, __be64;
#define __aligned_u64 __u64 __attribute__((aligned(8)))
typedef __u16 __sum16;
typedef __u32 __wsum;
typedef _Bool bool;
typedef unsigned long size_t;
typedef unsigned long uintptr_t;
#endif
