# The image's two entry points, its descriptor tables and everything that runs in ring 0.
#
# Ring 0 is kept to a few dozen instructions: some KVM back ends interpret it, at about one microsecond each, while
# ring 3 always runs natively. So the tables are built by the assembler, the IDT is filled from ring 3, and the main
# program lives in ring 3. AT&T syntax.

# Xen's PHYS32_ENTRY note: where a PVH loader enters, in 32-bit protected mode with paging off.
    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 4, 18
    .asciz "Xen"
    .long entry_pvh

    .section .text.entry, "ax"

# PVH: %ebx = hvm_start_info.
    .code32
    .globl entry_pvh
entry_pvh:
    cld
    mov %ebx, %esi
    xor %ebp, %ebp
    mov $pml4, %eax
    mov %eax, %cr3
    mov $0x620, %eax                    # PAE, and OSFXSR | OSXMMEXCPT: ring 3 uses SSE
    mov %eax, %cr4
    mov $0xc0000080, %ecx               # EFER.LME
    rdmsr
    or $0x100, %eax
    wrmsr
    mov $0x80000033, %eax               # PG NE ET MP PE
    mov %eax, %cr0
    lgdt gdtr
    ljmp $8, $entry_common

# The 64-bit Linux boot protocol: %rsi = boot_params. The loader's page tables may map this image and nothing else.
    .code64
    .globl entry64
entry64:
    cld
    mov $1, %ebp
    mov $pml4, %eax
    mov %rax, %cr3
    mov $0x620, %eax
    mov %rax, %cr4
    mov $0x80000033, %eax
    mov %rax, %cr0
    lgdt gdtr(%rip)

# %rsi = boot information, %ebp = protocol. CS, DS and SS need no reload: iretq replaces CS and SS and nulls DS.
entry_common:
    mov $stack0_top, %esp
    mov $tss, %eax                      # the descriptor's base is in pieces no relocation can fill
    mov %ax, gdt_tss + 2(%rip)
    shr $16, %eax
    mov %al, gdt_tss + 4(%rip)
    mov %ah, gdt_tss + 7(%rip)
    mov $0x28, %eax
    ltr %ax
    lidt idtr(%rip)
    mov %rsi, %rdi
    mov %ebp, %esi
    pushq $0x1b                         # SS
    pushq $stack3_top - 8               # RSP as after a call
    pushq $2                            # RFLAGS: interrupts off
    pushq $0x23                         # CS
    pushq $ring3_start
    iretq

# Ring 3 asks for ring 0 by `ud2` with SERVICE in %r11d and the ring-0 function's address in %rax (see ring0.rs).
# `syscall` and `int` would do on hardware, but an interpreted ring 0 enters by exceptions only.
    .set SERVICE, 0x6b737568            # "husk"
    .globl service_gate
service_gate:
    cmp $SERVICE, %r11d
    jne 1f
    call *%rax
    xor %r11d, %r11d
    addq $2, (%rsp)
    iretq
1:  push $0
    push $6
    jmp exception

# One 16-byte stub a vector: 0-31 exceptions, 32-47 interrupts.
    .balign 16
    .globl vector_stubs
vector_stubs:
    .set vector, 0
    .rept 48
    .balign 16
    .if (vector < 32) && ((0x60227d00 >> vector) & 1)   # the CPU pushes an error code
    .else
    pushq $0
    .endif
    pushq $vector
    .if vector < 32
    jmp exception
    .else
    jmp interrupt
    .endif
    .set vector, vector + 1
    .endr

# Stack: vector, error code, RIP, CS, RFLAGS, RSP, SS. A fault of ring 3 goes on in ring 3, at ring3_fault(vector,
# error, rip, cr2); a fault of a ring-0 service makes its caller continue with %r11d = 1.
    .balign 16
exception:
    testb $3, 24(%rsp)
    jz 1f
    pop %rdi
    pop %rsi
    mov (%rsp), %rdx
    mov %cr2, %rcx
    movq $ring3_fault, (%rsp)
    movq $stack3_top - 8, 24(%rsp)
    iretq
1:  mov $stack0_top - 40, %esp
    mov $1, %r11d
    addq $2, (%rsp)
    iretq

# Counts the interrupt and ends it at the local APIC (xAPIC mode).
interrupt:
    push %rax
    mov 8(%rsp), %eax
    lock incl interrupt_counts - 32 * 4(, %rax, 4)
    mov $0xfee000b0, %eax
    movl $0, (%rax)
    pop %rax
    add $16, %rsp
    iretq

    .section .data.tables, "aw"
# Identity map of the low 4 GiB in 2 MiB pages, writable and open to ring 3.
    .balign 4096
    .globl pml4
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
    .globl pdpt
pdpt:
    .quad pd + 7, pd + 0x1007, pd + 0x2007, pd + 0x3007
    .fill 508, 8, 0
pd:
    .set page, 0
    .rept 2048
    .quad page + 0x87
    .set page, page + 0x200000
    .endr

    .balign 8
    .globl gdt
gdt:
    .quad 0
    .quad 0x00af9b000000ffff            # 0x08 ring 0 code, 64-bit
    .quad 0x00cf93000000ffff            # 0x10 ring 0 data
    .quad 0x00cff3000000ffff            # 0x18 ring 3 data
    .quad 0x00affb000000ffff            # 0x20 ring 3 code, 64-bit
gdt_tss:
    .quad 0x0000890000000067, 0         # 0x28 TSS, base filled in above
gdtr:
    .word gdtr - gdt - 1
    .quad gdt
idtr:
    .word 48 * 16 - 1
    .quad IDT
    .balign 8
tss:
    .long 0
    .quad stack0_top                    # RSP0
    .fill 90
    .word 104                           # no I/O bitmap

    .section .bss.stacks, "aw", @nobits
    .balign 16
    .skip 4096
stack0_top:
    .skip 16384
stack3_top:
